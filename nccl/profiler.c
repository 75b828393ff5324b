/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A profiler plugin for NCCL that tells mfsd of collectives: which TCP connections a communicator has (stage 2), and when
 * each collective or send begins and ends on the network.
 *
 *     make nccl-plugin
 *     NCCL_PROFILER_PLUGIN=.../libnccl-profiler-mfsd.so  NCCL_NET=Socket  ...
 *
 * NCCL calls us from its own threads, so nothing here waits or fails: what is to be said goes as one datagram into a
 * socket that a helper process reads (python3 -m mfsd.integrations.nccl, or MFSD_NCCL_PYTHON), which is a client of mfsd
 * like any other. When the socket is full or the helper gone, it is dropped. Looking for connections (/proc/self/fd) is
 * done by a thread of ours.
 *
 * Which connections are a communicator's: all that the process gets between the communicator's init, or what was looked
 * at last, and the end of its first operation on the network. Later ones count only if a network plugin names them
 * (ncclProfileNetPlugin of a socket plugin; NCCL's own one says so if built with NCCL_ENABLE_NET_PROFILING).
 *
 * Pools are static and never given back, so a handle that NCCL uses too long points at something harmless.
 */
#define _GNU_SOURCE
#include "abi.h"

#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
	COMMS = 256,
	OPERATIONS = 256, /* of one communicator at a time; what is more is not told */
	KNOWN = 8192,     /* connections that belong to somebody already */
	LINE = 96,
	INFO = 3, /* NCCL_LOG_INFO */
};

extern char **environ;

struct comm;

/* A collective, a send, or one proxy operation of either. */
struct operation {
	struct comm *comm;
	struct operation *parent; /* of a proxy operation */
	uint64_t sequence, bytes;
	atomic_int used;
	atomic_int open;  /* proxy operations that go on, and one for the host's part */
	atomic_bool told; /* its begin */
	bool proxy;
};

struct comm {
	atomic_int used;
	int ranks;
	atomic_ullong sequence;
	atomic_uint next; /* operation to try */
	atomic_int looks; /* how often its connections have been looked for: before and after its first operation */
	atomic_bool wanted;
	struct operation operations[OPERATIONS];
};

static struct comm comms[COMMS];
static uint64_t known[KNOWN];
static int knowns;
static atomic_int helper = -1; /* our end of the socket; -1: nobody hears us */
static pid_t helper_pid, owner;
static sem_t wake;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
	char line[LINE];
	int fd = atomic_load(&helper);
	va_list words;

	if (fd < 0 || getpid() != owner)
		return;
	va_start(words, format);
	int n = vsnprintf(line, sizeof(line), format, words);
	va_end(words);
	if (n <= 0 || n >= (int)sizeof(line))
		return;
	if (send(fd, line, (size_t)n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 && (errno == EPIPE || errno == ECONNRESET)) {
		atomic_store(&helper, -1); /* it has ended; the descriptor stays, since others may be in here */
		sem_post(&wake);
	}
}

/* --- connections ------------------------------------------------------------------------------------------------- */

/* SO_COOKIE of a TCP connection over IP; 0: it is none. */
static uint64_t cookie_of(int fd)
{
	struct sockaddr_storage peer;
	socklen_t peer_size = sizeof(peer), size = sizeof(uint64_t), int_size = sizeof(int);
	uint64_t cookie = 0;
	int protocol = 0;

	if (getsockopt(fd, SOL_SOCKET, SO_PROTOCOL, &protocol, &int_size) || protocol != IPPROTO_TCP)
		return 0;
	if (getpeername(fd, (struct sockaddr *)&peer, &peer_size))
		return 0;
	return getsockopt(fd, SOL_SOCKET, SO_COOKIE, &cookie, &size) ? 0 : cookie;
}

/* True if nobody had it before. Our thread's alone, but for init's first look. */
static bool claim(uint64_t cookie)
{
	static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
	bool ours = true;

	pthread_mutex_lock(&lock);
	for (int i = 0; i < knowns && ours; i++)
		ours = known[i] != cookie;
	if (ours && knowns < KNOWN)
		known[knowns++] = cookie;
	pthread_mutex_unlock(&lock);
	return ours;
}

/* Claim all connections of the process that are new, and mark them if they are a communicator's. */
static void look(const struct comm *comm)
{
	DIR *folder = opendir("/proc/self/fd");
	struct dirent *entry;

	if (!folder)
		return;
	while ((entry = readdir(folder))) {
		uint64_t cookie = cookie_of(atoi(entry->d_name));

		if (cookie && claim(cookie) && comm)
			say("mark %d %llu", (int)(comm - comms), (unsigned long long)cookie);
	}
	closedir(folder);
}

static void *watch(void *unused)
{
	for (;;) {
		while (sem_wait(&wake))
			;
		for (int i = 0; i < COMMS; i++)
			if (atomic_exchange(&comms[i].wanted, false))
				look(&comms[i]);
		if (atomic_load(&helper) < 0 && getpid() == owner)
			waitpid(helper_pid, NULL, 0);
	}
	return unused;
}

static void want(struct comm *comm)
{
	if (atomic_fetch_add(&comm->looks, 1) < 2) {
		atomic_store(&comm->wanted, true);
		sem_post(&wake);
	}
}

/* --- the helper -------------------------------------------------------------------------------------------------- */

static void start(void)
{
	const char *python = getenv("MFSD_NCCL_PYTHON");
	char *words[] = {(char *)(python && *python ? python : "python3"), "-m", "mfsd.integrations.nccl", NULL};
	posix_spawn_file_actions_t actions;
	posix_spawnattr_t how;
	pthread_attr_t detached;
	pthread_t thread;
	sigset_t none;
	int pair[2];

	owner = getpid();
	if (sem_init(&wake, 0, 0) || socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair))
		return;
	sigemptyset(&none);
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, pair[1], 0);
	posix_spawnattr_init(&how);
	posix_spawnattr_setflags(&how, POSIX_SPAWN_SETPGROUP | POSIX_SPAWN_SETSIGMASK);
	posix_spawnattr_setsigmask(&how, &none);
	int failed = posix_spawnp(&helper_pid, words[0], &actions, &how, words, environ);
	posix_spawnattr_destroy(&how);
	posix_spawn_file_actions_destroy(&actions);
	close(pair[1]);
	if (failed) {
		close(pair[0]);
		return;
	}
	atomic_store(&helper, pair[0]);
	pthread_attr_init(&detached);
	pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
	if (pthread_create(&thread, &detached, watch, NULL))
		atomic_store(&helper, -1);
	pthread_attr_destroy(&detached);
}

/* --- what NCCL calls --------------------------------------------------------------------------------------------- */

static int begin(void **context, int *mask, int ranks, logger log)
{
	pthread_once(&once, start);
	*context = NULL;
	*mask = 0;
	if (atomic_load(&helper) < 0) {
		if (log)
			log(INFO, ~0UL, __FILE__, __LINE__, "mfsd: no helper (MFSD_NCCL_PYTHON), so no hints");
		return NCCL_SUCCESS;
	}
	for (int i = 0; i < COMMS; i++) {
		int no = 0;

		if (!atomic_compare_exchange_strong(&comms[i].used, &no, 1))
			continue;
		comms[i].ranks = ranks;
		atomic_store(&comms[i].looks, 0);
		look(NULL); /* what is open by now is not this one's */
		*context = &comms[i];
		*mask = EVENT_COLL | EVENT_P2P | EVENT_PROXY_OP | EVENT_NET_PLUGIN;
		break;
	}
	return NCCL_SUCCESS;
}

static int init_v4(void **context, int *mask, const char *name, uint64_t hash, int nodes, int ranks, int rank, logger log)
{
	(void)name, (void)hash, (void)nodes, (void)rank;
	return begin(context, mask, ranks, log);
}

static int init_v5(void **context, uint64_t id, int *mask, const char *name, int nodes, int ranks, int rank, logger log)
{
	(void)name, (void)id, (void)nodes, (void)rank;
	return begin(context, mask, ranks, log);
}

static struct operation *take(struct comm *comm)
{
	/* In turns: proxy operations begin after NCCL has stopped what they belong to, so its place stays as it is. */
	for (int i = 0; i < OPERATIONS; i++) {
		struct operation *one = &comm->operations[atomic_fetch_add(&comm->next, 1) % OPERATIONS];
		int no = 0;

		if (atomic_compare_exchange_strong(&one->used, &no, 1)) {
			one->comm = comm;
			one->parent = NULL;
			one->proxy = false;
			atomic_store(&one->told, false);
			atomic_store(&one->open, 1);
			return one;
		}
	}
	return NULL;
}

static uint64_t size_of(const char *type)
{
	const char *digits = type ? strpbrk(type, "0123456789") : NULL;

	return digits ? strtoul(digits, NULL, 10) / 8 : 1; /* ncclFloat16, ncclInt64, ncclBfloat16, ncclFloat8e4m3 */
}

/* Bytes that a rank sends, by the ring algorithm; 0: none. */
static uint64_t sends(const char *function, uint64_t count, uint64_t ranks)
{
	if (!function || ranks < 2)
		return 0;
	if (!strcmp(function, "AllReduce"))
		return 2 * (ranks - 1) * count / ranks;
	if (!strcmp(function, "AllGather") || !strcmp(function, "ReduceScatter") || !strcmp(function, "AlltoAll"))
		return (ranks - 1) * count;
	return strcmp(function, "Recv") ? count : 0;
}

static void ended(struct operation *one)
{
	if (atomic_fetch_sub(&one->open, 1) != 1)
		return;
	if (atomic_load(&one->told)) {
		say("end %d %llu", (int)(one->comm - comms), (unsigned long long)one->sequence);
		want(one->comm);
	}
	atomic_store(&one->used, 0);
}

static bool ours(const void *pointer)
{
	return (const char *)pointer >= (const char *)comms && (const char *)pointer < (const char *)(comms + COMMS);
}

static void proxy(struct comm *comm, void **handle, const struct event *event)
{
	struct operation *parent = event->parent, *one;

	if (event->proxy_op.pid != owner || !event->proxy_op.is_send || !ours(parent) || parent->proxy)
		return;
	one = take(comm);
	if (!one)
		return;
	one->proxy = true;
	one->parent = parent;
	atomic_fetch_add(&parent->open, 1);
	if (parent->bytes && !atomic_exchange(&parent->told, true)) {
		want(comm);
		say("begin %d %llu %llu", (int)(comm - comms), (unsigned long long)parent->sequence,
		    (unsigned long long)parent->bytes);
	}
	*handle = one;
}

static void named(const struct comm *comm, const struct event *event)
{
	const struct socket_event *sock = event->net.data;
	uint64_t cookie;

	if (event->net.id != NET_SOCKET_V1 || !sock || sock->kind != NET_SOCKET_EVENT)
		return;
	cookie = cookie_of(sock->socket.fd);
	if (cookie && claim(cookie))
		say("mark %d %llu", (int)(comm - comms), (unsigned long long)cookie);
}

static int start_event(void *context, void **handle, uint64_t type, struct event *event)
{
	struct comm *comm = context;
	struct operation *one;

	*handle = NULL;
	if (!comm || !event)
		return NCCL_SUCCESS;
	if (type == EVENT_PROXY_OP)
		proxy(comm, handle, event);
	else if (type == EVENT_NET_PLUGIN)
		named(comm, event);
	else if ((type == EVENT_COLL || type == EVENT_P2P) && (one = take(comm))) {
		bool coll = type == EVENT_COLL;

		one->sequence = atomic_fetch_add(&comm->sequence, 1);
		one->bytes = coll ? sends(event->coll.function, event->coll.count, (uint64_t)comm->ranks) * size_of(event->coll.type)
				  : sends(event->p2p.function, event->p2p.count, 2) * size_of(event->p2p.type);
		*handle = one;
	}
	return NCCL_SUCCESS;
}

static int start_v4(void *context, void **handle, struct event *event)
{
	return start_event(context, handle, event ? *(const uint8_t *)event : 0, event);
}

static int start_v5(void *context, void **handle, struct event *event)
{
	return start_event(context, handle, event ? event->type : 0, event);
}

static int stop_event(void *handle)
{
	struct operation *one = handle;

	if (!ours(one) || !atomic_load(&one->used))
		return NCCL_SUCCESS;
	if (one->proxy)
		ended(one->parent);
	ended(one);
	return NCCL_SUCCESS;
}

static int record_event_state(void *handle, int state, void *args)
{
	(void)handle, (void)state, (void)args;
	return NCCL_SUCCESS;
}

static int finalize(void *context)
{
	struct comm *comm = context;

	if (!comm)
		return NCCL_SUCCESS;
	say("over %d", (int)(comm - comms));
	for (int i = 0; i < OPERATIONS; i++)
		atomic_store(&comm->operations[i].used, 0);
	atomic_store(&comm->used, 0);
	return NCCL_SUCCESS;
}

#define TABLE(version, form)                                                                                          \
	__attribute__((visibility("default"))) const struct table_##form ncclProfiler_v##version = {                   \
		"mfsd", init_##form, start_##form, stop_event, record_event_state, finalize}

TABLE(4, v4);
TABLE(5, v5);
TABLE(6, v5);
TABLE(7, v5);
