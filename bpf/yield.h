/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * yield.h - how much a deferred connection may send: the control law of yield.bpf.c, on one struct mfsd_path.
 *
 * All connections of this host to one peer and in one band are steered together. They cross the same queue, so that
 * what one of them has felt is news to all, and they are equals by construction; a connection of its own would hear
 * from the queue once in 8 ms (64 of them on 200 Mbit/s) and go by luck. Two numbers say what each of them may have in
 * flight: share * part.
 *
 * `share` is slow: the window of one connection while nobody urgent is about. It grows while the queue is below its
 * target and shrinks above it, and the target of a large share is lower than that of a small one (target_of). So hosts
 * that meet in the same queue come to the same share, whatever each of them began with: that is fairness inside a
 * level. It learns nothing while it yields, nor until everybody who has been sent to sleep is back (be_calm).
 *
 * `part` is fast, and the same for all: 1 until the queue is past LIMIT of the target, then down to PART_LEAST within a
 * round trip or two; and back to 1 at once when the queue is gone. Equals yield and return as equals.
 *
 * With less than four packets in flight a connection is paced, and pacing acts late: what is laid down at send time
 * holds until the next packet. That dead time, more than the round trip, is what the gains below are made for
 * (pace_of); it is why the rate follows the queue only a little (rate_of) though a window would follow it fully. While
 * the share is used in full, packets go one by one, which halves the dead time; the receiver acknowledges every second.
 * A yielding connection sends two at a time instead: its next packet would come too late to spare it the receiver's
 * delayed ACK of 40 ms.
 *
 * ACKs may be late (yield_clock.h): then round trips are longer, and what a connection has in flight with them, so that
 * it sends as fast as without (window_of). A window of so many packets must not leave at once, or it would be a queue:
 * these connections are paced whatever they have in flight. And they grow less boldly, since it shows later.
 *
 * Times are microseconds, windows UNIT-ths of packets, unless a name says otherwise.
 */
#ifndef MFSD_YIELD_H
#define MFSD_YIELD_H

#include "mfsd.h"

#define UNIT 1024 /* of windows and of fractions */
#define NEVER 0xffffffff
#define MAX_SHARE (1 << 26)
#define LEAST_SHARE 8
#define FIRST_SHARE (UNIT / 2)
#define FEW (4 * UNIT)	/* packets in flight below which a connection is paced by time */
#define MANY (64 * UNIT) /* above which it is not paced at all */

#define GROUP 4		   /* least samples of a step */
#define SLICE_US 200	   /* least time between two steps; the least delay of it counts: noise only ever adds */
#define SLICE_BACK 8	   /* ... and one in so many of what ACKs wait on their way back */
#define LONE_US 50000	   /* longer than receivers keep an ACK to themselves */
#define BASE_US 30000000   /* a base round trip is forgotten after one or two of these */
#define PROBE_US 5000000   /* without an empty queue for so long, we make room to see the base */
#define PROBE_PACES 6	   /* ... for so long, on the way there */
#define PROBE_BACKS 2	   /* ... and on the way back: until what is under way has come, and what is sent then */
#define EPOCH_US 200000	   /* over which connections are counted */
#define PART_LEAST (UNIT / 32)
#define PART_PROBE (UNIT / 8)
#define LIMIT 1792	   /* of the target, above which we yield */
#define TRACK 100	   /* gain of the share around its target */
#define GROW 256	   /* ... and in an empty queue */
#define BACK_GROW 2	   /* ... as long as ACKs are late by at most so many targets */
#define ADD 16		   /* what every share grows by in a pace */
#define ONSET 16	   /* of the share, lost at every onset of yielding ... */
#define FADE_US 1000000	   /* ... and the time in which it fades while it goes on: who stays is not asked to come back */
#define FALL 4096	   /* per target's worth of queue past the limit, and at most, in a round trip */
#define FOLLOW 400	   /* of the queue's error, in the rate */
#define PROBES 1000	   /* share of the link that sleepers of one path take all the same: one in so many */
#define CALM_TRIPS 60	   /* for so many round trips nobody learns after a part of PART_CALM or less */
#define PART_CALM (UNIT / 10)
#define HERE 4		   /* targets that packets wait in our own bands, above which it is not the share that holds them back */
#define LOSS 8		   /* of the share, at a loss */
#define STRENGTH 250	   /* packets of one connection in the queue, in the target */

static __always_inline __u32 at_most(__u64 value, __u32 bound)
{
	return value < bound ? value : bound;
}

/* The queue that a share of this size aims at, a quarter of `most` to all of it: the larger, the less. */
static __always_inline __u32 target_of(const struct mfsd_path *p, __u32 most)
{
	return at_most(most / 4 + (__u64)STRENGTH * (p->base_us + most) / (p->share + 1), most) + 1;
}

/* How long it takes until a change of the share shows. */
static __always_inline __u32 pace_of(const struct mfsd_path *p, __u32 most)
{
	__u64 trip = p->base_us + most, gap = 0;

	if (p->share < FEW)
		gap = at_most(trip * UNIT / (p->share + 1) / 2, 4 * most);
	return trip + p->back_us + gap + 1;
}

/* Growth in an empty queue. What is seen a long way back later must not be a queue by then. */
static __always_inline __u64 grow_of(const struct mfsd_path *p, __u32 most)
{
	return p->back_us > BACK_GROW * most ? (__u64)GROW * BACK_GROW * most / p->back_us : GROW;
}

/* How late ACKs are, as far as that is news. */
static __always_inline __u32 late_of(const struct mfsd_path *p, __u64 now)
{
	return now - p->slice_at < EPOCH_US ? p->back_us : 0;
}

/*
 * Packets that one connection may have in flight: more than its part of the share while ACKs are late. But by no more than
 * a link of `rate` bytes/s carries meanwhile: where processors are late, a share is larger than it seems.
 */
static __always_inline __u64 window_of(const struct mfsd_path *p, __u64 now, __u64 rate, __u32 mss)
{
	__u64 window = (__u64)p->share * p->part / UNIT, late = late_of(p, now), more;

	if (p->base_us != NEVER && mss) {
		more = window * late / (p->base_us + p->target_us + 1);
		window += at_most(more, at_most(rate * late / 1000000 * UNIT / mss, MAX_SHARE));
	}
	return at_most(window / UNIT, MAX_SHARE / UNIT);
}

/*
 * Nobody learns until those are awake again who sent while we yielded; they sleep the longer, the smaller our part was.
 * It must not depend on the share: who has little would learn more seldom than who has much, and never come back.
 */
static __always_inline void be_calm(struct mfsd_path *p, __u64 now, __u32 most)
{
	__u64 calm = CALM_TRIPS * (__u64)(p->base_us + most);
	__u64 until = now + p->back_us + (p->part > PART_CALM ? calm * PART_CALM / p->part : calm);

	if (until > p->calm_until)
		p->calm_until = until;
}

static __always_inline void yield_to(struct mfsd_path *p, __u64 now, __u64 dt, __u32 delay, __u32 most)
{
	__u64 part = p->part, share = p->share, gain, step;
	__u32 trip = p->base_us + p->back_us + most + 1, limit = (__u64)most * LIMIT / UNIT;

	if (!p->yielding) {
		p->yielding = 1;
		share -= share * ONSET / UNIT;
	}
	share -= share * dt / (dt + FADE_US);
	p->share = share;
	p->yielded_us += dt;
	gain = at_most((__u64)FALL * (delay - limit) / (most + 1), FALL);
	step = part * gain / UNIT * at_most(dt, trip) / trip;
	part -= step < part / 4 * 3 ? step : part / 4 * 3;
	p->part = part > PART_LEAST ? part : PART_LEAST;
	be_calm(p, now, most);
}

static __always_inline void share_out(struct mfsd_path *p, __u64 now, __u64 dt, __u32 delay, __u32 target, __u32 most)
{
	__u32 pace = pace_of(p, most);
	__u64 part = p->part, share = p->share, gain, step;

	p->yielding = 0;
	if (delay < target / 2) {
		if (part < UNIT / 4)
			p->empty_at = now;
		part = UNIT;
	} else {
		part += (UNIT - part) * at_most(dt, pace) / pace + 1;
	}
	p->part = part < UNIT ? part : UNIT;
	if (now < p->calm_until)
		return;
	dt = at_most(dt, 8 * pace);
	gain = (__u64)TRACK * target / pace;
	if (delay <= target && !p->held)
		return; /* who has nothing to send does not learn how much it might */
	if (delay <= target) {
		gain = gain * (target - delay) / target;
		if (delay < target / 4)
			gain += grow_of(p, most) * (target / 4 - delay) / (target / 4);
		step = share * gain * dt / UNIT / pace;
		share += step < share / 4 ? step : share / 4;
	} else {
		step = share * gain * (delay - target) / target * dt / UNIT / pace;
		share -= step < share / 4 ? step : share / 4;
	}
	share += ADD * dt / pace;
	p->share = share < LEAST_SHARE ? LEAST_SHARE : at_most(share, MAX_SHARE);
}

/* Makes room for a moment, so that the queue shows the round trip without it. */
static __always_inline void make_room(struct mfsd_path *p, __u64 now, __u32 most)
{
	if (!p->room_since)
		p->room_since = now;
	p->part = PART_PROBE;
	be_calm(p, now, most);
	if (now - p->room_since > PROBE_PACES * (__u64)(pace_of(p, most) - p->back_us) + PROBE_BACKS * (__u64)p->back_us) {
		p->room_since = 0;
		p->empty_at = now;
		p->part = UNIT;
	}
}

/* One step, of a slice that began at `begun` and in which the queue was `delay`. `most`: the target of this level. */
static __always_inline void steer(struct mfsd_path *p, __u64 now, __u64 begun, __u32 delay, __u32 most)
{
	__u64 dt = at_most(now - begun, EPOCH_US);
	__u32 target = target_of(p, most);

	p->delay_us = delay;
	p->target_us = target;
	p->steered_us += dt;
	if (p->room_since || now - p->empty_at > PROBE_US)
		make_room(p, now, most);
	else if (delay > (__u64)most * LIMIT / UNIT)
		yield_to(p, now, dt, delay, most);
	else
		share_out(p, now, dt, delay, target, most);
}

/* The round trip without queue: the least of this period and the one before. */
static __always_inline __u32 base_of(struct mfsd_path *p, __u64 now, __u32 trip)
{
	if (now - p->base_since > BASE_US) {
		p->base_since = now;
		p->base_us = p->base_next_us;
		p->base_next_us = NEVER;
	}
	if (trip < p->base_next_us)
		p->base_next_us = trip;
	if (trip < p->base_us)
		p->base_us = trip;
	return p->base_us;
}

/*
 * A round trip has taken `delay` longer than the base, and `back` on top, which its ACK has waited. In the course of a
 * `tick`, `back` goes from a tick too little to what it is, and `delay` with it: so a slice is that long. `lone`: the ACK
 * is for one packet, which the receiver may have kept to itself for a while; where there are no others, as of receivers
 * that acknowledge every packet, it counts. Several CPUs may be at it; a sample that gets lost is no loss, but only one
 * of them takes the step.
 */
static __always_inline void heard(struct mfsd_path *p, __u64 now, __u32 delay, __u32 back, __u32 tick, int lone, __u32 most)
{
	__u32 slice = back ? tick + back / SLICE_BACK : SLICE_US;
	__u64 begun = p->slice_at;

	if (!lone)
		p->paired_at = now;
	else if (delay > p->delay_us && (__u32)now - p->paired_at < LONE_US)
		return;
	p->samples += 1;
	p->delay_sum += delay;
	p->back_us = at_most(back, p->last_back_us); /* one alone may be a fit of the receiver's */
	p->last_back_us = back;
	if (delay < p->least_us)
		p->least_us = delay;
	p->in_group += 1;
	if (p->in_group < GROUP || now - begun < slice ||
	    __sync_val_compare_and_swap(&p->slice_at, begun, now) != begun)
		return;
	delay = p->least_us;
	p->in_group = 0;
	p->least_us = NEVER;
	if (delay == NEVER)
		return;
	steer(p, now, begun, delay, most);
	p->held = 0;
}

/*
 * A packet was lost, or marked by the network. With a queue to be seen that is one more reason to yield. Without one it
 * may be a buffer that is shorter than our target; or no loss at all but packets that have overtaken others, which TCP
 * finds out later (kept).
 */
static __always_inline void lost(struct mfsd_path *p, __u64 now, __u32 most)
{
	if (now - p->lost_at < p->base_us + p->delay_us + p->back_us + most)
		return;
	p->lost_at = now;
	p->share -= p->share / LOSS;
	if (p->delay_us > most / 2) {
		p->part = PART_LEAST;
		be_calm(p, now, most);
	} else {
		p->regretted = 1;
	}
}

/* It was none. */
static __always_inline void kept(struct mfsd_path *p)
{
	if (!p->regretted)
		return;
	p->regretted = 0;
	p->share += p->share / (LOSS - 1);
}

/* Bytes/s of a paced connection; 0: it need not be paced. */
static __always_inline __u64 rate_of(const struct mfsd_path *p, __u32 mss, __u32 most)
{
	__u64 window = (__u64)p->share * p->part / UNIT;
	__u32 trip, error, follow, target = p->target_us;
	int back = p->back_us > most;

	if (p->base_us == NEVER)
		return 0;
	if (back && window >= FEW) {
		trip = (p->base_us + target) / 5 * 4; /* a little faster than the window lets it */
	} else if (!back && (p->delay_us <= most / 2 || window > MANY)) {
		return 0;
	} else if (window >= FEW) {
		trip = (p->base_us + p->delay_us) / 2; /* only to spread out what the window lets through */
	} else {
		trip = p->base_us + most;
		follow = at_most((__u64)FOLLOW * target / pace_of(p, most), UNIT);
		error = at_most(p->delay_us > target ? p->delay_us - target : target - p->delay_us, target);
		error = (__u64)follow * error / UNIT;
		trip = p->delay_us > target ? trip + error : trip - error;
	}
	return window * mss * 1000000 / UNIT / (trip + 1) + 1;
}

#endif /* MFSD_YIELD_H */
