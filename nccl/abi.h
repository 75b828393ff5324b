/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What this plugin uses of NCCL's profiler interface, versions 4 to 7 (NCCL 2.26 and later): the table that NCCL looks
 * up by name, and the head of the event descriptions, which is the same in all of them but for the width of the type.
 * The interface is NVIDIA's (src/include/plugin/profiler in NCCL's sources); these declarations are our own and name
 * only what is read.
 */
#ifndef MFSD_NCCL_ABI_H
#define MFSD_NCCL_ABI_H

#include <stddef.h>
#include <stdint.h>

enum { NCCL_SUCCESS = 0 };

/* Kinds of events: bits of the mask that init fills in, and an event's type. */
enum {
	EVENT_COLL = 1 << 1,
	EVENT_P2P = 1 << 2,
	EVENT_PROXY_OP = 1 << 3,
	EVENT_NET_PLUGIN = 1 << 7,
};

/* Of a network plugin's event: which plugin, and version 1 of what a socket plugin says. */
enum { NET_SOCKET_V1 = 2 << 16 | 1, NET_SOCKET_EVENT = 1 << 0 };

struct coll {
	uint64_t sequence;
	const char *function;
	const void *from;
	void *into;
	size_t count; /* elements */
	int root;
	const char *type;
};

struct p2p {
	const char *function;
	void *buffer;
	const char *type;
	size_t count;
	int peer;
};

struct proxy_op {
	int pid; /* of the process that asked for it: its handles are of that process */
	uint8_t channel;
	int peer, steps, chunk, is_send;
};

struct net_plugin {
	int64_t id;
	void *data;
};

struct socket_event {
	uint8_t kind;
	struct {
		int fd, op;
		size_t length;
	} socket;
};

struct event {
	uint64_t type; /* version 4: the first byte alone */
	void *parent;
	int rank;
	union {
		struct coll coll;
		struct p2p p2p;
		struct proxy_op proxy_op;
		struct net_plugin net;
	};
};

_Static_assert(offsetof(struct event, coll) == 24, "where NCCL has it");
_Static_assert(offsetof(struct event, coll.type) == 72, "where NCCL has it");
_Static_assert(offsetof(struct event, p2p.count) == 48, "where NCCL has it");
_Static_assert(offsetof(struct event, proxy_op.is_send) == 44, "where NCCL has it");
_Static_assert(offsetof(struct event, net.data) == 32, "where NCCL has it");
_Static_assert(offsetof(struct socket_event, socket.fd) == 8, "where NCCL has it");

typedef void (*logger)(int level, unsigned long flags, const char *file, int line, const char *format, ...);

/* Version 4. */
struct table_v4 {
	const char *name;
	int (*init)(void **context, int *mask, const char *comm_name, uint64_t comm_hash, int nodes, int ranks, int rank,
		    logger log);
	int (*start_event)(void *context, void **handle, struct event *event);
	int (*stop_event)(void *handle);
	int (*record_event_state)(void *handle, int state, void *args);
	int (*finalize)(void *context);
};

/* Versions 5 to 7. */
struct table_v5 {
	const char *name;
	int (*init)(void **context, uint64_t comm_id, int *mask, const char *comm_name, int nodes, int ranks, int rank,
		    logger log);
	int (*start_event)(void *context, void **handle, struct event *event);
	int (*stop_event)(void *handle);
	int (*record_event_state)(void *handle, int state, void *args);
	int (*finalize)(void *context);
};

#endif
