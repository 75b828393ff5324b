// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * sockets.bpf.c - tells the daemon of TCP connections instead of letting it search for them, and puts those that a
 * rule names into their band before their first packet.
 *
 * Two programs on the root of the cgroup v2 hierarchy, so that they see every socket of the host, whatever its network
 * namespace:
 *
 *   mfsd_socket	(sock_create) runs in the process that makes a socket and notes who that is in the socket's own
 *			storage. Accepted sockets inherit the note of the one that listened (BPF_F_CLONE). Those that are
 *			older than the daemon have none, nor those of the kernel's own, as under an MPTCP listener: whose
 *			they are the daemon finds out.
 *   mfsd_connection	(sock_ops) runs when a connection is made, by either side, and at every change of its state.
 *
 * When a connection is made: it goes into the directory (mfsd_socks), by which a hint's cookie leads to its addresses
 * without a search. Then, if its 5-tuple has been hinted before, that slot is its own from here on; else if a rule names
 * it, a free slot is taken (mfsd_free, which the daemon keeps filled) and filled in as the rule says. Either is told to
 * the daemon (mfsd_events). This is before the SYN of a connection that is opened here, and before accept(2) returns on
 * the other side: so the first data packet is in the right band, and nobody has been asked.
 *
 * While it lasts, and is of another network namespace than the daemon's, which can't ask TCP there: it is noted in its
 * slot when all that has left is acknowledged.
 *
 * When it is over: a connection with a slot is reported with how far the peer has acknowledged, and whether that was
 * all. Then it leaves the directory. Nothing is said of connections that no hint and no rule names, but how they ended is
 * remembered for a while (mfsd_ends): the hint may be on its way.
 *
 * docs/architecture.md says why by these hooks. Needs Linux 6.1 (bpf_get_current_pid_tgid() in sock_create).
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include "compat.h"
#include "mfsd.h"
#include "rules.h"

#define ALLOW	       1 /* go on as if we were not here, for both program types */
#define SOCK_STREAM    1
#define AF_INET	       2
#define AF_INET6       10
#define TCP_FIN_WAIT2  5
#define TCP_TIME_WAIT  6
#define TCP_CLOSE      7
#define TCP_LAST_ACK   9
#define TCP_CLOSING    11

/* The classifier's; the loader puts them in place. */
MFSD_MMAP_ARRAY(mfsd_host, struct mfsd_host, 1);
MFSD_MMAP_ARRAY(mfsd_slots, struct mfsd_slot, MFSD_DEFAULT_SLOTS);
MFSD_HASH(mfsd_cookies, __u64, __u32, MFSD_DEFAULT_SLOTS);
MFSD_HASH(mfsd_tuples, struct mfsd_tuple, __u32, MFSD_DEFAULT_SLOTS);

/* Our own. */
MFSD_MAP(mfsd_socks, BPF_MAP_TYPE_LRU_HASH, __u64, struct mfsd_sock, MFSD_SOCKETS, 0);
MFSD_MAP(mfsd_ends, BPF_MAP_TYPE_LRU_HASH, __u64, struct mfsd_event, MFSD_ENDS, 0);
MFSD_MMAP_ARRAY(mfsd_rules, struct mfsd_rule, MFSD_RULES);
MFSD_HASH(mfsd_rules_of, struct in6_addr, struct mfsd_rules_of, MFSD_RULES);
MFSD_MAP(mfsd_asked, BPF_MAP_TYPE_LRU_HASH, __u32, __u64, MFSD_ASKED, 0); /* when the daemon was asked, by thread */
struct {
	__uint(type, BPF_MAP_TYPE_STACK);
	__type(value, __u32);
	__uint(max_entries, MFSD_DEFAULT_SLOTS);
} mfsd_free SEC(".maps");
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, MFSD_EVENT_BYTES);
} mfsd_events SEC(".maps");
MFSD_MMAP_ARRAY(mfsd_lost, __u64, 1); /* events that the ring had no room for */
MFSD_MMAP_ARRAY(mfsd_here, __u64, 1); /* cookie of the daemon's network namespace */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC | BPF_F_CLONE);
	__type(key, int);
	__type(value, struct mfsd_owner);
} mfsd_owners SEC(".maps");
/*
 * What is being put together; the stack is small. Keys and what a search has found so far are here, too: without
 * CAP_PERFMON older kernels take 32 bits that are kept on the stack for a pointer, and refuse to have them changed
 * ("attempt to corrupt spilled pointer", seen on 6.1). A connect may be interrupted by packets that establish or end
 * others, where the kernel is preemptible by connects, too: each run takes a draft that nobody has on its processor.
 */
struct draft {
	struct mfsd_event event; /* first: what is given to the ring */
	struct in6_addr nobody; /* stays zero: the peer of rules that name none */
	__u32 index;
	__u8 band; /* of event.rule */
	__u8 unsure; /* the daemon must say: there are more rules than are looked at, or nobody knows who made it */
	__u8 asks; /* a rule means somebody by a description, and the daemon may not have looked at this maker yet */
	__u32 taken;
	__u64 now;
};
#define DRAFTS 8
static const __u32 draft_keys[DRAFTS] = { 0, 1, 2, 3, 4, 5, 6, 7 };
MFSD_PERCPU_ARRAY(mfsd_draft, struct draft, DRAFTS);

#include "hear.h" /* which needs the maps */

SEC("cgroup/sock_create")
int mfsd_socket(struct bpf_sock *sk)
{
	struct mfsd_owner *owner;

	if (sk->type != SOCK_STREAM || (sk->family != AF_INET && sk->family != AF_INET6))
		return ALLOW;
	owner = bpf_sk_storage_get(&mfsd_owners, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!owner)
		return ALLOW; /* no memory: nobody's */
	owner->cgroup = bpf_get_current_cgroup_id();
	owner->pid = bpf_get_current_pid_tgid() >> 32;
	owner->tid = bpf_get_current_pid_tgid();
	owner->uid = bpf_get_current_uid_gid();
	return ALLOW;
}

/* Who, from where, to where. IPv4-mapped addresses of IPv6 sockets are IPv4, as on the wire. */
static __always_inline void describe(struct bpf_sock_ops *ctx, struct mfsd_sock *sock)
{
	struct mfsd_tuple *key = &sock->key;
	struct mfsd_owner *owner;
	struct bpf_sock *sk;
	__u32 *s = (__u32 *)key->saddr, *d = (__u32 *)key->daddr, peer;

	if (ctx->family == AF_INET) {
		s[0] = s[1] = d[0] = d[1] = 0;
		s[2] = d[2] = MFSD_NET32(0xffff);
		s[3] = ctx->local_ip4;
		peer = ctx->remote_ip4;
		asm volatile("%0 += 0" : "+r"(peer)); /* else the tails are merged, and the verifier refuses the address */
		d[3] = peer;
	} else {
		s[0] = ctx->local_ip6[0];
		s[1] = ctx->local_ip6[1];
		s[2] = ctx->local_ip6[2];
		s[3] = ctx->local_ip6[3];
		d[0] = ctx->remote_ip6[0];
		d[1] = ctx->remote_ip6[1];
		d[2] = ctx->remote_ip6[2];
		d[3] = ctx->remote_ip6[3];
	}
	key->sport = MFSD_NET16((__u16)ctx->local_port);
	key->dport = (__u16)(ctx->remote_port >> 16); /* network order, in the upper half */
	key->proto = IPPROTO_TCP;
	__builtin_memset(key->pad, 0, sizeof(key->pad));
	sock->netns = bpf_get_netns_cookie(ctx);
	sock->bound = 0;
	sock->flags = ctx->op == BPF_SOCK_OPS_TCP_CONNECT_CB ? MFSD_EVENT_ACTIVE : 0;
	sk = ctx->sk; /* and again below: kept on the stack, it could not be proven to be whole */
	if (sk)
		sock->bound = sk->bound_dev_if;
	MFSD_REREAD();
	owner = ctx->sk ? bpf_sk_storage_get(&mfsd_owners, ctx->sk, 0, 0) : 0;
	if (owner)
		sock->owner = *owner;
	else
		__builtin_memset(&sock->owner, 0, sizeof(sock->owner));
}

#define WORDS (sizeof(struct mfsd_rules_of) / sizeof(__u16))
_Static_assert(!(WORDS & (WORDS - 1)), "a power of two");

struct look {
	struct draft *d;
	const struct mfsd_rules_of *list;
};

/* The next rule of a list: d->event.rule becomes that if it puts the connection higher. 1: there are no more. */
static long consider(__u32 i, struct look *look)
{
	const struct mfsd_rules_of *list = look->list;
	struct draft *d = look->d;
	struct mfsd_rule *r;
	__u64 at = i + 1;

	if (i >= list->n)
		return 1;
	/* Masked, as the verifier also goes where a mispredicted branch would: n and rules are WORDS numbers. */
	MFSD_HIDE(at);
	d->index = ((const __u16 *)list)[at & (WORDS - 1)];
	r = MFSD_LOOKUP(mfsd_rules, &d->index);
	if (!r || !leads(r, &d->event.sock))
		return 0;
	if (!means(r, &d->event.sock.owner)) {
		d->unsure |= !d->event.sock.owner.pid;
	} else if (r->band == MFSD_BAND_KEEP) {
		d->asks = 1;
	} else if (d->event.rule == MFSD_NO_RULE || r->band < d->band) {
		d->event.rule = d->index;
		d->band = r->band;
	}
	return 0;
}

/*
 * Puts the rule of a list that puts the connection highest into d->event.rule, if there is a better one than that. By
 * bpf_loop() (Linux 5.17), which has the body verified once; without CAP_PERFMON 6.1 gives up on a loop of its own.
 */
static __always_inline void best_of(const struct mfsd_rules_of *list, struct draft *d)
{
	struct look look = { d, list };

	if (!list)
		return;
	if (list->n > MFSD_RULES_PER_PEER)
		d->unsure = 1;
	bpf_loop(MFSD_RULES_PER_PEER, consider, &look, 0);
}

/* Whether the daemon is to look who made a connection; once in a while for each thread. */
static __always_inline int ask(struct draft *d)
{
	__u64 *asked = MFSD_LOOKUP(mfsd_asked, &d->event.sock.owner.tid);

	d->now = bpf_ktime_get_ns();
	if (asked && d->now - *asked < MFSD_ASK_NS)
		return 0;
	bpf_map_update_elem(&mfsd_asked, &d->event.sock.owner.tid, &d->now, BPF_ANY);
	return 1;
}

/* Undoes take_slot(), but for the key. */
static __always_inline void give_back(__u32 *index)
{
	struct mfsd_slot *slot = MFSD_LOOKUP(mfsd_slots, index);

	if (slot) {
		slot->expires_ns = 0;
		slot->band = MFSD_BAND_KEEP;
	}
	bpf_map_push_elem(&mfsd_free, index, 0);
}

/* Takes a free slot for a connection that a rule names; MFSD_NO_SLOT if there is none. */
static __always_inline __u32 take_slot(struct draft *d, const struct mfsd_rule *r)
{
	struct mfsd_slot *slot;

	if (bpf_map_pop_elem(&mfsd_free, &d->index))
		return MFSD_NO_SLOT;
	slot = MFSD_LOOKUP(mfsd_slots, &d->index);
	if (!slot)
		return MFSD_NO_SLOT; /* can't be: the daemon put it there */
	slot->generation += 1;
	slot->lane = r->lanes > 1 ? 1 + (__u16)(d->event.cookie % (r->lanes - 1)) : 0;
	slot->band = r->band;
	slot->flags = 0;
	slot->bytes = slot->packets = slot->last_ns = slot->acked = slot->sent = 0;
	slot->origin = slot->ifindex = 0;
	slot->expires_ns = r->expires_ns;
	if (bpf_map_update_elem(&mfsd_cookies, &d->event.cookie, &d->index, BPF_NOEXIST)) {
		give_back(&d->index);
		return MFSD_NO_SLOT;
	}
	return d->index;
}

/*
 * 0 unless the ring is full, as when the daemon gets no processor. What is not told must not have happened: the callers
 * see to that, and the daemon, which is told how often, looks into the directory.
 */
static __always_inline long tell(struct mfsd_event *e)
{
	MFSD_CONST(__u32, zero, 0);
	long full = bpf_ringbuf_output(&mfsd_events, e, sizeof(*e), 0);
	__u64 *n;

	if (full) {
		n = MFSD_LOOKUP(mfsd_lost, &zero);
		if (n)
			__sync_fetch_and_add(n, 1);
	}
	return full;
}

static __always_inline void established(struct bpf_sock_ops *ctx, struct draft *d)
{
	struct mfsd_event *e = &d->event;
	struct mfsd_rules_of *list;
	struct mfsd_rule *r;
	__u32 *slot;

	describe(ctx, &e->sock);
	e->flags = e->sock.flags;
	bpf_map_update_elem(&mfsd_socks, &e->cookie, &e->sock, BPF_ANY);
	e->kind = MFSD_EVENT_BOUND;
	slot = MFSD_LOOKUP(mfsd_cookies, &e->cookie);
	if (slot) {
		e->slot = *slot;
		tell(e); /* else the daemon finds it in the directory */
		return;
	}
	slot = MFSD_LOOKUP(mfsd_tuples, &e->sock.key);
	if (slot) {
		e->slot = *slot;
		if (!bpf_map_update_elem(&mfsd_cookies, &e->cookie, &e->slot, BPF_NOEXIST) && tell(e))
			bpf_map_delete_elem(&mfsd_cookies, &e->cookie); /* it goes on by its tuple */
		return;
	}
	d->unsure = d->asks = 0;
	list = MFSD_LOOKUP(mfsd_rules_of, (struct in6_addr *)e->sock.key.daddr);
	best_of(list, d);
	list = MFSD_LOOKUP(mfsd_rules_of, &d->nobody);
	best_of(list, d);
	e->slot = MFSD_NO_SLOT;
	if (e->rule != MFSD_NO_RULE) {
		r = MFSD_LOOKUP(mfsd_rules, &e->rule);
		if (r)
			e->slot = take_slot(d, r);
	} else if (!d->unsure && (!d->asks || !ask(d))) {
		return;
	}
	e->kind = MFSD_EVENT_MATCHED;
	if (tell(e) && e->slot != MFSD_NO_SLOT) {
		bpf_map_delete_elem(&mfsd_cookies, &e->cookie);
		give_back(&e->slot);
	}
}

static __always_inline void closed(struct bpf_sock_ops *ctx, struct mfsd_event *e)
{
	struct mfsd_sock *sock = MFSD_LOOKUP(mfsd_socks, &e->cookie);
	__u32 was = ctx->args[0], *slot;

	describe(ctx, &e->sock);
	e->flags = sock ? sock->flags : 0;
	if (sock && !e->sock.owner.pid)
		e->sock.owner = sock->owner; /* as the daemon has found it */
	e->kind = MFSD_EVENT_CLOSED;
	e->acked = ctx->bytes_acked;
	/* Only a peer that has acknowledged our FIN brings a connection to these states; the FIN comes after all data. */
	if (ctx->snd_una == ctx->snd_nxt &&
	    (was == TCP_FIN_WAIT2 || was == TCP_TIME_WAIT || was == TCP_LAST_ACK || was == TCP_CLOSING))
		e->flags |= MFSD_EVENT_CLEAN;
	e->rule = bpf_ktime_get_ns() / 1000000;
	slot = MFSD_LOOKUP(mfsd_cookies, &e->cookie);
	e->slot = MFSD_NO_SLOT;
	if (slot) {
		e->slot = *slot;
		tell(e); /* else the daemon finds out when it looks after its connections */
	}
	if (e->acked || e->flags != MFSD_EVENT_ACTIVE) /* else nobody has answered, and it may be connected once more */
		bpf_map_update_elem(&mfsd_ends, &e->cookie, e, BPF_ANY);
	bpf_map_delete_elem(&mfsd_socks, &e->cookie);
}

/* One that is free, until `taken` is cleared. */
static __always_inline struct draft *take_draft(void)
{
#pragma unroll
	for (int i = 0; i < DRAFTS; i++) {
		struct draft *d = MFSD_LOOKUP(mfsd_draft, &draft_keys[i]);

		if (d && !__sync_val_compare_and_swap(&d->taken, 0, 1))
			return d;
	}
	return 0;
}

SEC("sockops")
int mfsd_connection(struct bpf_sock_ops *ctx)
{
	__u32 op = ctx->op;
	struct mfsd_event *e;
	struct draft *d;

	if (op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB || (op == BPF_SOCK_OPS_STATE_CB && ctx->args[1] != TCP_CLOSE)) {
		hear(ctx); /* programs of cgroups below run before, and may have set their own flags instead */
		return ALLOW;
	}
	if (op == BPF_SOCK_OPS_RTT_CB) {
		acknowledged(ctx);
		return ALLOW;
	}
	if (op != BPF_SOCK_OPS_STATE_CB && op != BPF_SOCK_OPS_TCP_CONNECT_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return ALLOW;
	d = take_draft();
	if (!d)
		return ALLOW; /* so many were interrupted here: nobody hears of this one */
	e = &d->event;
	e->cookie = bpf_get_socket_cookie(ctx);
	e->acked = 0;
	e->rule = MFSD_NO_RULE;
	if (op == BPF_SOCK_OPS_STATE_CB) {
		closed(ctx, e);
	} else {
		hear(ctx);
		established(ctx, d);
	}
	MFSD_REREAD();
	d->taken = 0;
	return ALLOW;
}
MFSD_LICENSE("GPL");
