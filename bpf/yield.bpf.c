// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * yield.bpf.c - makes deferred connections yield wherever the queue is, where the classifier can only order what leaves
 * this host.
 *
 * A congestion control (struct_ops) that reads, by the socket's cookie, the slot table of the classifier: the band of
 * the slot decides what the connection is. So one store by the daemon changes its band and its manners at once.
 *
 *   deferred	It keeps the queue at the bottleneck below a target, and gets out of the way of whoever does not: that
 *		is yield.h. Connections to the same peer are steered together, by what any of them has felt.
 *   urgent	Cubic, by the kernel's own functions, if the socket ran cubic before. It stays with us, so that it yields
 *		from the next packet on when it is deferred again, as connections that carry message after message are.
 *   neither	No slot for a while, or a socket that ran something else than cubic and is not deferred: it is given back
 *		to the algorithm that it had. That is also what becomes of all of them at their next packet when the
 *		daemon is dead (its heartbeat in mfsd_host is too old). So nobody keeps our code longer than needed.
 *
 * Who gets it: connections that are deferred, and nobody else. mfsd_mannered (sock_ops, at the root of the cgroups)
 * looks when a connection is made and then once per round trip; mfsd_adopt (an iterator) looks at those that are older
 * than we are. A socket that has chosen its algorithm itself, or that chooses another one later, keeps it, unless the
 * daemon says otherwise. Whoever chooses ours by TCP_CONGESTION gets it.
 *
 * The window and the rate are set right before something is sent (mfsd_send), as the kernel overwrites the rate after
 * every ACK. That hook is meant for the size of bursts, but it is called in the right moment, and in all kernels alike:
 * the arguments of cong_control have changed, so has cwnd_event. A window of w packets lets bursts of w / 2 through
 * (tcp_cwnd_test).
 *
 * The round trip counts the queue of the ACKs, too. By the peer's clock in the ACKs (TSval) we know how much longer than
 * at best they have been under way, and take that off: a busy way back must not slow down a free way out.
 *
 * Needs BTF, Linux 6.1, and to load it CAP_PERFMON besides the two that the classifier takes. Loaded with the
 * classifier's maps.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>
#include "compat.h"
#include "kernel.h"
#include "mfsd.h"
#include "yield.h"

#define ALLOW		1
#define AF_INET		2
#define TCP_ESTABLISHED 1
#define TCP_CLOSE_WAIT	8
#define SOL_TCP		6
#define TCP_CONGESTION	13
#define CB_FLAGS	1008 /* TCP_BPF_SOCK_OPS_CB_FLAGS, since 6.11 */
#define NAME_LEN	16   /* TCP_CA_NAME_MAX */
#define PACING_NONE	0    /* enum sk_pacing */
#define PACING_NEEDED	1
#define PACING_FQ	2
#define INFINITE	0x7fffffff /* TCP_INFINITE_SSTHRESH */
#define INITIAL_WINDOW	10
#define UNHINTED_US	5000000 /* without a slot for so long, a connection goes back to what it ran before */
#define TICK_US		1000	/* of TSval (TCP_TS_HZ) */
#define SKEW		8192	/* clocks drift by less than one in so many */
#define SAME_CLOCK_US	1000000
#define CUBIC_WORDS	8 /* of icsk_ca_priv are cubic's; the rest is ours */

/* The classifier's; the loader puts them in place. */
MFSD_MMAP_ARRAY(mfsd_host, struct mfsd_host, 1);
MFSD_MMAP_ARRAY(mfsd_slots, struct mfsd_slot, MFSD_DEFAULT_SLOTS);
MFSD_HASH(mfsd_cookies, __u64, __u32, MFSD_DEFAULT_SLOTS);

/* Our own. */
MFSD_MMAP_ARRAY(mfsd_yield, struct mfsd_yield, 1);
MFSD_MAP(mfsd_paths, BPF_MAP_TYPE_LRU_HASH, struct mfsd_path_key, struct mfsd_path, MFSD_PATHS, 0);
MFSD_MMAP_ARRAY(mfsd_adopted, struct mfsd_adopted, 1);

enum standing {
	SETTLED, /* not ours to touch, or not any more */
	OURS,	 /* put under our algorithm by us */
	FOREIGN, /* has chosen its algorithm itself */
};

/* What a socket was before we came. */
struct before {
	char name[NAME_LEN];
	__u32 standing;
};

struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct before);
} mfsd_before SEC(".maps");

/* The loader puts another name in place of this one, here and below, where it is taken. */
const volatile char mfsd_name[NAME_LEN] = "mfsd_yield";

extern void cubictcp_init(struct sock *sk) __ksym;
extern __u32 cubictcp_recalc_ssthresh(struct sock *sk) __ksym;
extern void cubictcp_cong_avoid(struct sock *sk, __u32 ack, __u32 acked) __ksym;
extern void cubictcp_state(struct sock *sk, __u8 state) __ksym;
extern void cubictcp_acked(struct sock *sk, const struct ack_sample *sample) __ksym;
extern __u32 tcp_reno_undo_cwnd(struct sock *sk) __ksym;

/* Our part of icsk_ca_priv, behind cubic's. */
struct mine {
	__u64 hinted_at;
	__u32 epoch;	/* of the path, in which we were counted last */
	__u32 clock_us; /* as mfsd_path's, of a peer that has another clock for every connection */
	__u8 class;
	__u8 band;
	__u8 paced; /* by us */
	__u8 own_clock;
	__u8 cubic; /* is what it ran before */
};

#define TCP(sk) ((struct tcp_sock *)(sk))
#define MINE(tp) ((struct mine *)&(tp)->inet_conn.icsk_ca_priv[CUBIC_WORDS])

static __always_inline struct mfsd_yield *config(void)
{
	__u32 zero = 0;

	return MFSD_LOOKUP(mfsd_yield, &zero);
}

/* The daemon is alive, and steers. */
static __always_inline int governed(__u64 now_ns, int *dead)
{
	struct mfsd_host *host;
	__u32 zero = 0;

	*dead = 1;
	host = MFSD_LOOKUP(mfsd_host, &zero);
	if (!host || host->abi_version != MFSD_ABI_VERSION)
		return 0;
	if (now_ns > host->heartbeat_ns && now_ns - host->heartbeat_ns > host->timeout_ns)
		return 0;
	*dead = 0;
	return host->flags & MFSD_HOST_ENFORCE;
}

/* Band of a connection; MFSD_BAND_KEEP if it has none. */
static __always_inline __u8 band_of(__u64 cookie, __u64 now_ns)
{
	struct mfsd_slot *slot;
	__u32 *row;

	row = MFSD_LOOKUP(mfsd_cookies, &cookie);
	slot = row ? MFSD_LOOKUP(mfsd_slots, row) : 0;
	return slot && now_ns <= slot->expires_ns && slot->band < MFSD_MAX_BANDS ? slot->band : MFSD_BAND_KEEP;
}

static __always_inline __u8 class_of(const struct mfsd_yield *y, __u8 band)
{
	return band < MFSD_MAX_BANDS ? y->class_of[band & (MFSD_MAX_BANDS - 1)] : MFSD_YIELD_NOT;
}

static __always_inline __u32 most_of(const struct mfsd_yield *y, __u8 class)
{
	return class == MFSD_YIELD_SECOND ? y->target_us / 2 : y->target_us;
}

static __always_inline struct mfsd_path *path_of(struct tcp_sock *tp)
{
	struct sock_common *sk = &tp->inet_conn.icsk_inet.sk.__sk_common;
	struct mfsd_path_key key = {};
	struct mfsd_path *p, fresh = {};
	__u32 *peer = (__u32 *)key.peer;

	if (sk->skc_family == AF_INET) {
		peer[2] = MFSD_NET32(0xffff);
		peer[3] = sk->skc_daddr;
	} else {
		peer[0] = sk->skc_v6_daddr.in6_u.u6_addr32[0];
		peer[1] = sk->skc_v6_daddr.in6_u.u6_addr32[1];
		peer[2] = sk->skc_v6_daddr.in6_u.u6_addr32[2];
		peer[3] = sk->skc_v6_daddr.in6_u.u6_addr32[3];
	}
	key.netns = sk->skc_net.net->net_cookie;
	key.band = MINE(tp)->band;
	p = MFSD_LOOKUP(mfsd_paths, &key);
	if (p)
		return p;
	fresh.slice_at = fresh.base_since = fresh.epoch_at = fresh.clock_at = tp->tcp_mstamp;
	fresh.empty_at = tp->tcp_mstamp > PROBE_US ? tp->tcp_mstamp - PROBE_US + PROBE_US / 5 : 0;
	fresh.base_us = fresh.base_next_us = fresh.least_us = NEVER;
	fresh.share = FIRST_SHARE;
	fresh.part = UNIT;
	fresh.epoch = 1;
	bpf_map_update_elem(&mfsd_paths, &key, &fresh, BPF_NOEXIST);
	return MFSD_LOOKUP(mfsd_paths, &key);
}

/* --- what a socket is ------------------------------------------------------------------------------------------ */

static __always_inline void pace(struct tcp_sock *tp, __u64 rate)
{
	struct sock *sk = (struct sock *)tp;
	struct mine *m = MINE(tp);

	if (sk->sk_pacing_status == PACING_FQ) {
		sk->sk_pacing_rate = rate ? rate : ~0UL;
	} else if (sk->sk_pacing_status == PACING_NEEDED && !m->paced) {
		if (rate && rate < sk->sk_pacing_rate) /* the application has it paced */
			sk->sk_pacing_rate = rate;
	} else if (rate) {
		sk->sk_pacing_rate = rate;
		sk->sk_pacing_status = PACING_NEEDED;
		m->paced = 1;
	} else if (m->paced) {
		sk->sk_pacing_status = PACING_NONE;
		m->paced = 0;
	}
}

/* From deferred to urgent: what the way holds, with the queue that we have kept. */
static __always_inline void hurry(struct tcp_sock *tp, const struct mfsd_yield *y)
{
	struct mfsd_path *p = path_of(tp);
	__u64 window = INITIAL_WINDOW;

	pace(tp, 0);
	if (p && p->base_us != NEVER && tp->mss_cache)
		window = y->rate * (p->base_us + 2 * (__u64)y->target_us) / 1000000 / tp->mss_cache;
	tp->snd_cwnd = window < INITIAL_WINDOW ? INITIAL_WINDOW : window;
	tp->snd_ssthresh = INFINITE;
}

static __always_inline int is_cubic(const char *name)
{
	return name[0] == 'c' && name[1] == 'u' && name[2] == 'b' && name[3] == 'i' && name[4] == 'c' && !name[5];
}

/* Gives the socket to the algorithm that it ran before; icsk_ca_priv is not ours any more. 0 if that was possible. */
static __always_inline long give_back(struct tcp_sock *tp)
{
	char name[NAME_LEN] = "cubic", last[NAME_LEN] = "reno";
	struct before *before;

	pace(tp, 0);
	before = bpf_sk_storage_get(&mfsd_before, tp, 0, 0);
	if (before) {
		__builtin_memcpy(name, before->name, sizeof(name));
		before->standing = SETTLED;
	}
	if (!bpf_setsockopt(tp, SOL_TCP, TCP_CONGESTION, name, sizeof(name)))
		return 0;
	return bpf_setsockopt(tp, SOL_TCP, TCP_CONGESTION, last, sizeof(last));
}

/* Looks what the socket is now, and makes it that. 0 when it is not ours any more. */
static __always_inline int settle(struct tcp_sock *tp, const struct mfsd_yield *y)
{
	__u64 now = tp->tcp_mstamp, now_ns = now * 1000;
	__u8 band = MFSD_BAND_KEEP, class;
	struct mine *m = MINE(tp);
	int dead;

	if (governed(now_ns, &dead))
		band = band_of(tp->inet_conn.icsk_inet.sk.__sk_common.skc_cookie.counter, now_ns);
	class = class_of(y, band);
	if (band != MFSD_BAND_KEEP)
		m->hinted_at = now;
	if (m->class != MFSD_YIELD_NOT && class == MFSD_YIELD_NOT)
		hurry(tp, y);
	if (class == MFSD_YIELD_NOT && (dead || !m->cubic || now - m->hinted_at > UNHINTED_US) && !give_back(tp))
		return 0;
	if (m->class != MFSD_YIELD_NOT && class == MFSD_YIELD_NOT)
		cubictcp_init((struct sock *)tp);
	m->class = class;
	m->band = band;
	return 1;
}

/* --- the algorithm --------------------------------------------------------------------------------------------- */

SEC("struct_ops/mfsd_init")
void BPF_PROG(mfsd_init, struct sock *sk)
{
	struct mine *m = MINE(TCP(sk));
	struct before *before;

	cubictcp_init(sk);
	before = bpf_sk_storage_get(&mfsd_before, TCP(sk), 0, 0);
	m->cubic = !before || is_cubic(before->name); /* who has chosen us has not said what else it wants */
	m->hinted_at = TCP(sk)->tcp_mstamp;
	m->class = MFSD_YIELD_NOT;
	m->band = MFSD_BAND_KEEP;
	m->epoch = 0;
	m->paced = 0;
	m->own_clock = 0;
}

/* Right before something is sent. */
SEC("struct_ops/mfsd_send")
__u32 BPF_PROG(mfsd_send, struct sock *sk)
{
	struct tcp_sock *tp = TCP(sk);
	struct mfsd_yield *y = config();
	struct mine *m = MINE(tp);
	struct mfsd_path *p;
	__u64 rate, floor, window, least;
	__u32 most;

	if (!y || !settle(tp, y) || m->class == MFSD_YIELD_NOT)
		return 2;
	p = path_of(tp);
	if (!p)
		return 2;
	most = most_of(y, m->class);
	floor = y->floor[m->band & (MFSD_MAX_BANDS - 1)];
	rate = rate_of(p, tp->mss_cache, most);
	window = (__u64)p->share * p->part / UNIT / UNIT;
	if (rate) {
		/* Without anything a sleeper would not notice that the queue is gone. */
		least = y->rate / PROBES / (p->flows + p->flows_now + 1);
		if (rate < least)
			rate = least;
		if (rate < floor)
			rate = floor;
		if (window < FEW / UNIT)
			window = p->part < UNIT ? 4 : 3;
	} else if (window < 2) {
		window = 2;
	}
	least = tp->mss_cache ? floor * (p->base_us + p->delay_us) / 1000000 / tp->mss_cache : 0;
	if (p->base_us != NEVER && window < least)
		window = at_most(least, MAX_SHARE);
	tp->snd_cwnd = window;
	pace(tp, rate);
	return 2;
}

/* How much longer than at best the ACK was under way, as far as its coarse time stamp tells. */
static __always_inline __u32 back_of(struct tcp_sock *tp, struct mfsd_path *p, struct mine *m)
{
	__u64 now = tp->tcp_mstamp;
	__u32 behind, skew, tick = TICK_US;
	__s32 late;

	if (!BPF_CORE_READ_BITFIELD(tp, rx_opt.saw_tstamp))
		return 0;
	if (bpf_core_field_exists(tp->tcp_usec_ts) && BPF_CORE_READ_BITFIELD(tp, tcp_usec_ts))
		tick = 1;
	behind = (__u32)now - tp->rx_opt.rcv_tsval * tick; /* wraps with the stamp, and so do differences */
	if (m->own_clock) {
		late = behind - m->clock_us;
		if (late < 0)
			m->clock_us = behind;
		return late > (__s32)tick ? late - tick : 0;
	}
	if (p->clock_at == p->base_since) /* the first */
		p->clock_us = behind;
	late = behind - p->clock_us;
	if (late > SAME_CLOCK_US || late < -SAME_CLOCK_US) {
		m->own_clock = 1; /* since 2026, kernels may have an offset for every connection */
		m->clock_us = behind;
		return 0;
	}
	skew = (now - p->clock_at) / SKEW;
	if (late < 0) {
		p->clock_us = behind;
		p->clock_at = now;
	} else if (skew) {
		p->clock_us += skew;
		p->clock_at = now;
	}
	return late > (__s32)tick ? late - tick : 0;
}

static __always_inline void count_flow(struct mfsd_path *p, struct mine *m, __u64 now)
{
	__u64 began = p->epoch_at;

	if (now - began > EPOCH_US && __sync_val_compare_and_swap(&p->epoch_at, began, now) == began) {
		p->flows = p->flows_now;
		p->flows_now = 0;
		p->epoch += 1;
	}
	if (m->epoch != p->epoch) {
		m->epoch = p->epoch;
		__sync_fetch_and_add(&p->flows_now, 1);
	}
}

SEC("struct_ops/mfsd_acked")
void BPF_PROG(mfsd_acked, struct sock *sk, const struct ack_sample *sample)
{
	struct tcp_sock *tp = TCP(sk);
	struct mfsd_yield *y = config();
	struct mine *m = MINE(tp);
	struct mfsd_path *p;
	__s32 trip = sample->rtt_us;

	if (!y || !settle(tp, y))
		return;
	if (m->class == MFSD_YIELD_NOT) {
		cubictcp_acked(sk, sample);
		return;
	}
	p = path_of(tp);
	if (!p)
		return;
	count_flow(p, m, tp->tcp_mstamp);
	if (trip > 0)
		heard(p, tp->tcp_mstamp, trip, back_of(tp, p, m), sample->pkts_acked < 2, most_of(y, m->class));
}

SEC("struct_ops/mfsd_avoid")
void BPF_PROG(mfsd_avoid, struct sock *sk, __u32 ack, __u32 acked)
{
	if (MINE(TCP(sk))->class != MFSD_YIELD_NOT)
		return; /* what it may send is decided when it sends */
	cubictcp_cong_avoid(sk, ack, acked);
}

/* Called when something was lost, or marked. */
SEC("struct_ops/mfsd_ssthresh")
__u32 BPF_PROG(mfsd_ssthresh, struct sock *sk)
{
	struct tcp_sock *tp = TCP(sk);
	struct mfsd_path *p;

	if (MINE(tp)->class == MFSD_YIELD_NOT)
		return cubictcp_recalc_ssthresh(sk);
	p = path_of(tp);
	if (p)
		lost(p, tp->tcp_mstamp);
	return 2;
}

SEC("struct_ops/mfsd_state")
void BPF_PROG(mfsd_state, struct sock *sk, __u8 state)
{
	if (MINE(TCP(sk))->class == MFSD_YIELD_NOT)
		cubictcp_state(sk, state);
}

SEC("struct_ops/mfsd_undo")
__u32 BPF_PROG(mfsd_undo, struct sock *sk)
{
	return tcp_reno_undo_cwnd(sk);
}

SEC(".struct_ops")
struct tcp_congestion_ops mfsd_yielding = {
	.init = (void *)mfsd_init,
	.ssthresh = (void *)mfsd_ssthresh,
	.cong_avoid = (void *)mfsd_avoid,
	.set_state = (void *)mfsd_state,
	.pkts_acked = (void *)mfsd_acked,
	.min_tso_segs = (void *)mfsd_send,
	.undo_cwnd = (void *)mfsd_undo,
	.name = "mfsd_yield",
};

/* --- who gets it ----------------------------------------------------------------------------------------------- */

static __always_inline int deferred(__u64 cookie)
{
	struct mfsd_yield *y = config();
	__u64 now = bpf_ktime_get_ns(); /* the coarse one is not for iterators */
	int dead;

	return y && cookie && governed(now, &dead) && class_of(y, band_of(cookie, now)) != MFSD_YIELD_NOT;
}

/* Decides on a socket of which we know `before`; `tp` is the same socket. 1: it is to get our algorithm. */
static __always_inline int wanted(struct before *before, struct tcp_sock *tp)
{
	struct mfsd_yield *y = config();

	if (before->standing == SETTLED && !before->name[0] && y && !(y->flags & MFSD_YIELD_REPLACE) &&
	    BPF_CORE_READ_BITFIELD(tp, inet_conn.icsk_ca_setsockopt))
		before->standing = FOREIGN;
	return before->standing == SETTLED;
}

SEC("sockops")
int mfsd_mannered(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct before *before;
	struct tcp_sock *tp;
	char ours[NAME_LEN];

	switch (ctx->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RTT_CB_FLAG);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		break;
	default:
		return ALLOW;
	}
	if (!sk || !deferred(bpf_get_socket_cookie(ctx)))
		return ALLOW;
	before = bpf_sk_storage_get(&mfsd_before, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	tp = bpf_skc_to_tcp_sock(sk);
	if (!before || !tp || !wanted(before, tp))
		return ALLOW;
	if (bpf_getsockopt(ctx, SOL_TCP, TCP_CONGESTION, before->name, sizeof(before->name)))
		return ALLOW;
	__builtin_memcpy(ours, (const void *)mfsd_name, sizeof(ours));
	if (!bpf_setsockopt(ctx, SOL_TCP, TCP_CONGESTION, ours, sizeof(ours)))
		before->standing = OURS;
	return ALLOW;
}

SEC("iter/tcp")
int mfsd_adopt(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct mfsd_adopted *adopted;
	struct before *before;
	struct tcp_sock *tp;
	char ours[NAME_LEN];
	__u32 zero = 0;
	int flags;

	adopted = MFSD_LOOKUP(mfsd_adopted, &zero);
	if (!sk || !adopted || (sk->skc_state != TCP_ESTABLISHED && sk->skc_state != TCP_CLOSE_WAIT))
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp)
		return 0;
	flags = tp->bpf_sock_ops_cb_flags;
	if (!(flags & BPF_SOCK_OPS_RTT_CB_FLAG)) {
		flags |= BPF_SOCK_OPS_RTT_CB_FLAG;
		if (bpf_setsockopt(tp, SOL_TCP, CB_FLAGS, &flags, sizeof(flags)))
			adopted->deaf += 1;
	}
	if (!deferred(sk->skc_cookie.counter))
		return 0;
	before = bpf_sk_storage_get(&mfsd_before, tp, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!before || !wanted(before, tp))
		return 0;
	if (bpf_getsockopt(tp, SOL_TCP, TCP_CONGESTION, before->name, sizeof(before->name)))
		return 0;
	__builtin_memcpy(ours, (const void *)mfsd_name, sizeof(ours));
	if (!bpf_setsockopt(tp, SOL_TCP, TCP_CONGESTION, ours, sizeof(ours))) {
		before->standing = OURS;
		adopted->switched += 1;
	}
	return 0;
}

MFSD_LICENSE("GPL");
