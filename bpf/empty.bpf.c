// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * empty.bpf.c - the baseline of the benchmark: what calling any program at all costs. Never attached by the daemon.
 */
#include "compat.h"

MFSD_PROGRAM
int mfsd_empty(struct __sk_buff *skb)
{
	return MFSD_NEXT;
}

MFSD_LICENSE("GPL");
