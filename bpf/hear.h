/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * hear.h - what the kernel is to tell of connections while they last. Part of sockets.bpf.c, whose maps it uses.
 */
#ifndef MFSD_HEAR_H
#define MFSD_HEAR_H

/* Has the kernel tell of what becomes of a connection; of acknowledgements only where the daemon can't ask TCP. */
static __always_inline void hear(struct bpf_sock_ops *ctx)
{
	__u64 netns = bpf_get_netns_cookie(ctx), *here;
	__u32 wanted = BPF_SOCK_OPS_STATE_CB_FLAG, flags;
	MFSD_CONST(__u32, zero, 0);

	here = MFSD_LOOKUP(mfsd_here, &zero);
	if (here && *here != netns)
		wanted |= BPF_SOCK_OPS_RTT_CB_FLAG;
	flags = ctx->bpf_sock_ops_cb_flags;
	if ((flags & wanted) != wanted)
		bpf_sock_ops_cb_flags_set(ctx, flags | wanted);
}

/* An acknowledgement has come. Of more than "that was all" the packets tell, while there are any. */
static __always_inline void acknowledged(struct bpf_sock_ops *ctx)
{
	struct mfsd_slot *slot;
	__u64 cookie;
	__u32 *row;

	if (ctx->snd_una != ctx->snd_nxt)
		return;
	cookie = bpf_get_socket_cookie(ctx);
	row = MFSD_LOOKUP(mfsd_cookies, &cookie);
	slot = row ? MFSD_LOOKUP(mfsd_slots, row) : 0;
	if (slot)
		slot->flags |= MFSD_SLOT_QUIET;
}

#endif /* MFSD_HEAR_H */
