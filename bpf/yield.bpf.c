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
 *   urgent	Cubic, by the kernel's own functions, if the socket ran cubic before. It stays with us for a second, so that
 *		it yields from the next packet on when it is deferred again, as connections that carry message after message
 *		are; for good if it has chosen us itself, as nobody might put it under us again.
 *   neither	No slot for a while, urgent for longer, or a socket that ran something else than cubic and is not deferred:
 *		it is given back to the algorithm that it had. That is also what becomes of all of them at their next packet
 *		when the daemon is dead (its heartbeat in mfsd_host is too old). So nobody keeps our code longer than needed.
 *
 * Who gets it: connections that are deferred, and nobody else. mfsd_mannered (sock_ops, at the root of the cgroups)
 * looks when a connection is made and then once per round trip; mfsd_adopt (an iterator) looks at those that are older
 * than we are. A socket that has chosen another algorithm than the default, or that chooses one later, keeps it,
 * unless the daemon says otherwise. Whoever chooses ours by TCP_CONGESTION gets it.
 *
 * The window and the rate are set right before something is sent (mfsd_send), as the kernel overwrites the rate after
 * every ACK. That hook is meant for the size of bursts, but it is called in the right moment, and in all kernels alike:
 * the arguments of cong_control have changed, so has cwnd_event. A window of w packets lets bursts of w / 2 through
 * (tcp_cwnd_test).
 *
 * The round trip counts the queue of the ACKs, too. By the peer's clock in the ACKs (TSval) we know how much longer than
 * at best they have been under way (yield_clock.h), and take that off: a busy way back must not slow down a free way out.
 * Nor must what packets wait in our own bands (yield_here.h).
 *
 * Needs BTF, Linux 6.4 (links), cubic in the kernel, and to load it CAP_PERFMON besides the two that the classifier
 * takes. Loaded with the classifier's maps.
 */
#include "yield_socket.h"
#include "yield_clock.h"
#include "yield_here.h"
#include "yield_who.h"

#define ALLOW		1
#define TCP_ESTABLISHED 1
#define TCP_FIN_WAIT1	4
#define TCP_CLOSE_WAIT	8
#define TCP_LAST_ACK	9
#define TCP_NODELAY	1
#define CB_FLAGS	1008 /* TCP_BPF_SOCK_OPS_CB_FLAGS, since 6.11 */

/* --- the algorithm --------------------------------------------------------------------------------------------- */

SEC("struct_ops/mfsd_init")
void BPF_PROG(mfsd_init, struct sock *sk)
{
	struct mine *m = MINE(TCP(sk));
	struct before *before;

	cubictcp_init(sk);
	before = bpf_sk_storage_get(&mfsd_before, TCP(sk), 0, 0);
	m->cubic = !before || !before->name[0] || is_cubic(before->name); /* who has chosen us runs cubic else */
	m->chosen = !before || !before->name[0];
	m->hinted_ms = m->urgent_ms = ms_of(TCP(sk));
	m->class = MFSD_YIELD_NOT;
	m->band = MFSD_BAND_KEEP;
	m->epoch = 0;
	m->paced = 0;
	m->ahead_us = 0;
	m->clocks = CLOCK_OF_PEER;
	m->clock.since = 0;
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

	if (m->class == MFSD_YIELD_NOT && m->looked == seldom(tp))
		return 2; /* whoever is not deferred sends so often that more would cost throughput */
	if (!y || !settle(tp, y) || m->class == MFSD_YIELD_NOT)
		return 2;
	p = path_of(tp);
	if (!p)
		return 2;
	most = most_of(y, p, m->class);
	floor = floor_of(y, p, m->band);
	rate = rate_of(p, tp->mss_cache, most);
	window = window_of(p, tp->tcp_mstamp, link_of(y, p), tp->mss_cache);
	if (rate) {
		/* Without anything a sleeper would not notice that the queue is gone. */
		least = link_of(y, p) / PROBES / (p->flows + p->flows_now + 1);
		if (rate < least)
			rate = least;
		if (rate < floor)
			rate = floor;
		if (window < FEW / UNIT)
			window = p->part < UNIT ? 4 : 3;
	} else if (window < 2) {
		window = 2;
	}
	least = tp->mss_cache ? floor * (p->base_us + p->delay_us + late_of(p, tp->tcp_mstamp)) / 1000000 / tp->mss_cache : 0;
	if (p->base_us != NEVER && window < least)
		window = at_most(least, MAX_SHARE);
	tp->snd_cwnd = window;
	pace(tp, rate);
	return 2;
}

/* What the ACK has waited on its way back; it may be by `tick` more. */
static __always_inline __u32 back_of(struct tcp_sock *tp, struct mfsd_path *p, struct mine *m, __u32 delay, __u32 *tick)
{
	__u32 now = tp->tcp_mstamp, behind, back, since = p->base_since;
	struct mfsd_peer_clock c;

	*tick = TICK_US;
	if (m->clocks == CLOCK_ODD || !BPF_CORE_READ_BITFIELD(tp, rx_opt.saw_tstamp))
		return 0;
	if (bpf_core_field_exists(tp->tcp_usec_ts) && BPF_CORE_READ_BITFIELD(tp, tcp_usec_ts))
		*tick = 1;
	behind = now - tp->rx_opt.rcv_tsval * *tick; /* wraps with the stamp, and so do differences */
	if (m->clocks == CLOCK_OF_PEER) {
		c = p->clock;
		if (c.since && behind - c.behind_us + SAME_CLOCK_US > 2 * SAME_CLOCK_US) {
			m->clocks = CLOCK_OWN;
			return 0;
		}
		back = waited(&c, since, now, behind, delay, *tick);
		p->clock = c;
	} else {
		c = m->clock;
		back = waited(&c, since, now, behind, delay, *tick);
		m->clock = c;
	}
	if (back == NEVER) {
		m->clocks = CLOCK_ODD;
		return 0;
	}
	return back;
}

/* A packet goes to its device; only those that the classifier has put into a band name a qdisc. */
SEC("tp_btf/net_dev_start_xmit")
int BPF_PROG(mfsd_left, struct sk_buff *skb)
{
	struct before *before;
	struct sock *sk;

	if (!(skb->priority >> 16))
		return 0;
	sk = skb->sk;
	before = sk ? bpf_sk_storage_get(&mfsd_before, sk, 0, 0) : 0;
	if (before && before->standing == OURS)
		note_left(before, skb->skb_mstamp_ns / 1000, bpf_ktime_get_ns() / 1000);
	return 0;
}

static __always_inline void count_flow(struct tcp_sock *tp, struct mfsd_path *p, struct mine *m)
{
	__u64 began = p->epoch_at, now = tp->tcp_mstamp;
	struct mfsd_path_key key = {};

	if (now - began > EPOCH_US && __sync_val_compare_and_swap(&p->epoch_at, began, now) == began) {
		p->flows = p->flows_now;
		p->flows_now = 0;
		p->epoch += 1;
		key_of(tp, &key);
		look_far(p, &key);
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
	__u32 delay, back, tick, here, most;

	if (!m->hinted_ms)
		return; /* before mfsd_init, see settle() */
	if (m->class == MFSD_YIELD_NOT) {
		cubictcp_acked(sk, sample); /* what it has become is asked when it sends */
		return;
	}
	if (!y || !settle(tp, y) || m->class == MFSD_YIELD_NOT)
		return;
	p = path_of(tp);
	if (!p)
		return;
	count_flow(tp, p, m);
	if (trip <= 0 || (__u32)tp->tcp_mstamp - trip == m->ahead_us)
		return;
	here = waited_here(tp, (__u32)tp->tcp_mstamp - trip);
	if (here < (__u32)trip)
		trip -= here;
	most = most_of(y, p, m->class);
	delay = trip - base_of(p, tp->tcp_mstamp, trip);
	back = back_of(tp, p, m, delay, &tick);
	if ((__s32)(tp->write_seq - tp->snd_nxt) >= (__s32)tp->mss_cache && here < HERE * most)
		p->held += 1;
	heard(p, tp->tcp_mstamp, delay - back, back, tick, sample->pkts_acked < 2, most);
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
	struct mfsd_yield *y = config();
	struct mfsd_path *p;

	if (MINE(tp)->class == MFSD_YIELD_NOT)
		return cubictcp_recalc_ssthresh(sk);
	p = path_of(tp);
	if (p && y)
		lost(p, tp->tcp_mstamp, most_of(y, p, MINE(tp)->class));
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
	struct mfsd_path *p;

	if (MINE(TCP(sk))->class == MFSD_YIELD_NOT)
		return tcp_reno_undo_cwnd(sk);
	p = path_of(TCP(sk));
	if (p)
		kept(p);
	return TCP(sk)->snd_cwnd;
}

/* The socket gets another algorithm, perhaps the next daemon's: to that, our pacing would be the application's wish. */
SEC("struct_ops/mfsd_release")
void BPF_PROG(mfsd_release, struct sock *sk)
{
	if (MINE(TCP(sk))->paced)
		pace(TCP(sk), 0);
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
	.release = (void *)mfsd_release,
	.flags = NON_RESTRICTED, /* workers may choose it for sockets that nobody tells us of: without a slot it is cubic */
	.name = "mfsd_yield",
};

/* --- who gets it ----------------------------------------------------------------------------------------------- */

SEC("sockops")
int mfsd_mannered(struct bpf_sock_ops *ctx)
{
	struct bpf_sock *sk = ctx->sk;
	struct before *before;
	struct tcp_sock *tp;
	__u64 ours[NAME_LEN / sizeof(__u64)], now = bpf_ktime_get_ns();

	switch (ctx->op) {
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
	case BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB:
		bpf_sock_ops_cb_flags_set(ctx, ctx->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_RTT_CB_FLAG);
		break;
	case BPF_SOCK_OPS_RTT_CB:
		/* Where round trips are short, one in a millisecond will do. */
		if (now / 1000 >> SELDOM_SHIFT == (now / 1000 - (__u64)ctx->args[0]) >> SELDOM_SHIFT)
			return ALLOW;
		break;
	default:
		return ALLOW;
	}
	if (!sk || !deferred(bpf_get_socket_cookie(ctx), now))
		return ALLOW;
	before = bpf_sk_storage_get(&mfsd_before, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	tp = bpf_skc_to_tcp_sock(sk);
	if (!before || !tp || !wanted(before, tp))
		return ALLOW;
	if (bpf_getsockopt(ctx, SOL_TCP, TCP_CONGESTION, before->name, sizeof(before->name)))
		return ALLOW;
	tidy(before);
	own_name(ours);
	if (!bpf_setsockopt(ctx, SOL_TCP, TCP_CONGESTION, (char *)ours, sizeof(ours)))
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
	__u64 ours[NAME_LEN / sizeof(__u64)];
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
	if (!deferred(sk->skc_cookie.counter, bpf_ktime_get_ns()))
		return 0;
	before = bpf_sk_storage_get(&mfsd_before, tp, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!before || !wanted(before, tp))
		return 0;
	if (bpf_getsockopt(tp, SOL_TCP, TCP_CONGESTION, before->name, sizeof(before->name)))
		return 0;
	tidy(before);
	own_name(ours);
	if (!bpf_setsockopt(tp, SOL_TCP, TCP_CONGESTION, (char *)ours, sizeof(ours))) {
		before->standing = OURS;
		adopted->switched += 1;
	}
	return 0;
}

/*
 * Who is promoted with nothing in flight would hear of it when its next packet is due, which may be tens of
 * milliseconds away. Taking Nagle's algorithm off a socket makes TCP send what it may (tcp_sock_set_nodelay), and we are
 * asked what that is first (mfsd_send).
 */
SEC("iter/tcp")
int mfsd_wake(struct bpf_iter__tcp *ctx)
{
	struct sock_common *sk = ctx->sk_common;
	struct tcp_sock *tp;
	int was, on = 1;

	if (!sk || (sk->skc_state != TCP_ESTABLISHED && sk->skc_state != TCP_FIN_WAIT1 &&
		    sk->skc_state != TCP_CLOSE_WAIT && sk->skc_state != TCP_LAST_ACK))
		return 0;
	tp = bpf_skc_to_tcp_sock(sk);
	if (!tp || !runs_ours(tp) || MINE(tp)->class == MFSD_YIELD_NOT || deferred(sk->skc_cookie.counter, bpf_ktime_get_ns()))
		return 0;
	if (bpf_getsockopt(tp, SOL_TCP, TCP_NODELAY, &was, sizeof(was)) ||
	    bpf_setsockopt(tp, SOL_TCP, TCP_NODELAY, &on, sizeof(on)) || was)
		return 0;
	bpf_setsockopt(tp, SOL_TCP, TCP_NODELAY, &was, sizeof(was));
	return 0;
}

MFSD_LICENSE("GPL");
