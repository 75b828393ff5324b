/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * yield_here.h - how long packets have waited in this host's own bands, which TCP takes for a part of the round trip.
 *
 * What governs there are the bands, and it is no news to them. Who took that for a queue of the network would stop as
 * often as others of this host have their turn, and begin again late when its own has come: that leaves the way idle.
 *
 * TCP stamps a packet when it hands it down (skb_mstamp_ns); a tracepoint says when it goes to its device. The last few
 * that were put into a band are remembered in the socket's storage, and looked up by that stamp when they are
 * acknowledged. Of a packet that goes to several devices, as a VLAN's, the last counts; of several with one stamp, too.
 */
#ifndef MFSD_YIELD_HERE_H
#define MFSD_YIELD_HERE_H

#include "yield_socket.h"

static __always_inline void note_left(struct before *before, __u32 stamp, __u32 now)
{
	__u32 at = before->last & (LEFT - 1);

	if (before->left[at] >> 32 != stamp) {
		before->last += 1;
		at = before->last & (LEFT - 1);
	}
	before->left[at] = (__u64)stamp << 32 | (__u32)(now - stamp);
}

/* Microseconds that the packet which was stamped `stamp`, or the last one before it, has waited; 0: not known. */
static __always_inline __u32 waited_here(struct tcp_sock *tp, __u32 stamp)
{
	struct before *before = bpf_sk_storage_get(&mfsd_before, tp, 0, 0);
	__u32 nearest = EPOCH_US, waited = 0, apart;

	if (!before)
		return 0;
#pragma unroll
	for (int i = 0; i < LEFT; i++) {
		apart = stamp - (__u32)(before->left[i] >> 32);
		if (apart < nearest) {
			nearest = apart;
			waited = before->left[i];
		}
	}
	return waited;
}

#endif /* MFSD_YIELD_HERE_H */
