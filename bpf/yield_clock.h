/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * yield_clock.h - how long an ACK has waited on its way back, by the peer's clock in it (TSval, RFC 7323).
 *
 * Own clock minus the peer's is what the way back takes, plus what the clocks are apart, plus what the peer's has run on
 * since its last tick (Linux: 1 ms). Its least is the way without queue; what an ACK shows above that, less a tick, has
 * been queue for sure. So it is known to a tick only, and better by those who look at ACKs that are spread over one
 * (heard).
 *
 * Clocks drift, by some 50 us a second if nobody disciplines them. One that comes closer shows at once. One that goes
 * away looks like queue, and must not, or nobody would yield any more. But of a round trip that has taken so much longer
 * than the base, the way back has taken no more than that: where an ACK would have been late by more, the clock has moved.
 * So it is set right whenever the way is free, both ways. While it is not, the least is that of the last period or two,
 * like the base, and of the same moments: what has been on the way back all the time is forgotten in both.
 *
 * Clocks with other ticks than Linux's run away: connections to these go by the round trip alone.
 */
#ifndef MFSD_YIELD_CLOCK_H
#define MFSD_YIELD_CLOCK_H

#include "yield.h"

#define TICK_US 1000 /* TCP_TS_HZ */
#define SAME_CLOCK_US 1000000
#define DRIFT 1024	/* clocks drift by less than one in so many */
#define ODD_US 20000	/* what more than that puts one wrong is no clock for us */

enum clocks {
	CLOCK_OF_PEER, /* all connections to it show the same one */
	CLOCK_OWN,     /* since 2026, kernels may have an offset for every connection */
	CLOCK_ODD,     /* none to go by */
};

/* A period is one of the base's; `delay`: of the whole round trip. Returns what the ACK has waited, or NEVER: it is odd. */
static __always_inline __u32 waited(struct mfsd_peer_clock *c, __u32 period, __u32 now, __u32 behind, __u32 delay,
				    __u32 tick)
{
	__u32 raise, allowed;
	__s32 late;

	period |= 1;
	if (!c->since || now - c->since > 2 * BASE_US) {
		c->behind_us = c->next_us = behind;
		c->raised_at = now;
	} else if (c->since != period) {
		c->behind_us = c->next_us;
		c->next_us = behind;
	}
	c->since = period;
	if ((__s32)(behind - c->next_us) < 0)
		c->next_us = behind;
	late = behind - c->behind_us;
	if (late < 0)
		c->behind_us = behind;
	if (late <= (__s32)tick)
		return 0;
	late -= tick;
	if ((__u32)late <= delay)
		return late;
	raise = late - delay;
	allowed = (now - c->raised_at) / DRIFT + 1;
	if (raise > allowed + ODD_US)
		return NEVER;
	c->behind_us += raise < allowed ? raise : allowed;
	c->raised_at = now;
	return delay;
}

#endif /* MFSD_YIELD_CLOCK_H */
