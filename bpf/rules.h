/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * rules.h - whether a rule leads to a connection, and means who made it.
 *
 * Arithmetic instead of branches: the verifier goes both ways at each, and into what a mispredicted one would do, for
 * every rule of a list.
 */
#ifndef MFSD_RULES_H
#define MFSD_RULES_H

#include "mfsd.h"

static __always_inline __u64 differs(const __u8 *a, const __u8 *b, const __u8 *mask)
{
	const __u64 *x = (const __u64 *)a, *y = (const __u64 *)b, *m = (const __u64 *)mask;

	return ((x[0] ^ y[0]) & m[0]) | ((x[1] ^ y[1]) & m[1]);
}

/* The sign bit: set unless first <= port <= last. */
static __always_inline __u64 outside(__u64 port, __u64 first, __u64 last)
{
	return ((port - first) | (last - port)) & (1ULL << 63);
}

/* 0 if they are the same, or any will do. */
static __always_inline __u64 another(__u64 wanted, __u64 id)
{
	return (wanted ^ MFSD_ANY_ID) * (wanted ^ id); /* of 32 bits each, so nothing overflows */
}

static __always_inline int leads(const struct mfsd_rule *r, const struct mfsd_sock *sock)
{
	__u64 off = r->used ^ 1;

	off |= outside(MFSD_NET16(sock->key.sport), r->sport_first, r->sport_last);
	off |= outside(MFSD_NET16(sock->key.dport), r->dport_first, r->dport_last);
	off |= differs(sock->key.daddr, r->daddr, r->dmask) | differs(sock->key.saddr, r->saddr, r->smask);
	return !off;
}

static __always_inline int means(const struct mfsd_rule *r, const struct mfsd_owner *owner)
{
	if (another(r->pid, owner->pid) | another(r->uid, owner->uid) | another(r->tid, owner->tid))
		return 0;
	return !r->cgroup || r->cgroup == owner->cgroup;
}

#endif /* MFSD_RULES_H */
