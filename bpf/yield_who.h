/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * yield_who.h - which sockets are to get the algorithm of yield.bpf.c, and which have it.
 */
#ifndef MFSD_YIELD_WHO_H
#define MFSD_YIELD_WHO_H

#include "yield_socket.h"

/* `now`: not by the coarse clock, which is not for iterators. */
static __always_inline int deferred(__u64 cookie, __u64 now)
{
	struct mfsd_yield *y = config();
	int dead;

	return y && cookie && governed(now, &dead) && class_of(y, band_of(cookie, now)) != MFSD_YIELD_NOT;
}

/* Names of algorithms: any daemon's. */
static __always_inline int is_yielding(const char *name)
{
	return name[0] == 'm' && name[1] == 'f' && name[2] == 's' && name[3] == 'd' && name[4] == '_';
}

/*
 * Whether a socket is to get our algorithm; `tp` is the same socket as the one that `before` is about. Who has asked for
 * another algorithm than its namespace's default has a reason. Who has asked for the default may as well have been given
 * back to it by a daemon before, and who runs yielding have been put under it.
 */
static __always_inline int wanted(struct before *before, struct tcp_sock *tp)
{
	struct mfsd_yield *y = config();

	if (before->standing == SETTLED && !before->name[0] && y && !(y->flags & MFSD_YIELD_REPLACE) &&
	    BPF_CORE_READ_BITFIELD(tp, inet_conn.icsk_ca_setsockopt) &&
	    tp->inet_conn.icsk_ca_ops != tp->inet_conn.icsk_inet.sk.__sk_common.skc_net.net->ipv4.tcp_congestion_control &&
	    !is_yielding(tp->inet_conn.icsk_ca_ops->name))
		before->standing = FOREIGN;
	return before->standing == SETTLED;
}

/* As the loader has put it there, which the compiler must not know better. */
static __always_inline void own_name(__u64 *name)
{
	name[0] = *(const volatile __u64 *)&mfsd_name[0];
	name[1] = *(const volatile __u64 *)&mfsd_name[sizeof(__u64)];
}

/* What it runs now; if that is a former daemon's yielding, what that had found is not known. */
static __always_inline void tidy(struct before *before)
{
	if (is_yielding(before->name))
		__builtin_memcpy(before->name, "cubic", sizeof("cubic"));
}

static __always_inline int runs_ours(struct tcp_sock *tp)
{
	__u64 ours[NAME_LEN / sizeof(__u64)], name[NAME_LEN / sizeof(__u64)];

	own_name(ours);
	if (bpf_core_read(name, sizeof(name), &tp->inet_conn.icsk_ca_ops->name))
		return 0;
	return name[0] == ours[0] && name[1] == ours[1];
}

#endif /* MFSD_YIELD_WHO_H */
