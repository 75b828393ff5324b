/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * compat.h - lets one C source serve two compilers.
 *
 * clang + libbpf (the default) declares maps as BTF-described structs in ".maps" and calls helpers by name. BCC
 * compiles on the target, defines BCC_SEC, declares maps with its own macros and rewrites map.lookup(). Everything in
 * which the two differ is here; classifier.bpf.c must not mention either.
 */
#ifndef MFSD_COMPAT_H
#define MFSD_COMPAT_H

#ifdef BCC_SEC

#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/pkt_cls.h>

#define MFSD_MMAP_ARRAY(name, type, n)	BPF_F_TABLE("array", u32, type, name, n, BPF_F_MMAPABLE)
#define MFSD_PERCPU_ARRAY(name, type, n) BPF_TABLE("percpu_array", u32, type, name, n)
#define MFSD_HASH(name, ktype, vtype, n) BPF_TABLE("hash", ktype, vtype, name, n)
#define MFSD_LOOKUP(map, key)		map.lookup(key) /* expanded by bcc_compile.py: BCC can't look into macros */
#define MFSD_PROGRAM			/* BCC takes every non-static function */
#define MFSD_CONST(type, name, value)	const type name = value /* on the stack: BCC has no .rodata */
#define MFSD_LICENSE(text)		/* BCC says GPL for us */

#else /* libbpf */

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/in6.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#define MFSD_MAP(name, map_type, ktype, vtype, n, flags)                                                               \
	struct {                                                                                                       \
		__uint(type, map_type);                                                                                \
		__type(key, ktype);                                                                                    \
		__type(value, vtype);                                                                                  \
		__uint(max_entries, n);                                                                                \
		__uint(map_flags, flags);                                                                              \
	} name SEC(".maps")

#define MFSD_MMAP_ARRAY(name, type, n)	MFSD_MAP(name, BPF_MAP_TYPE_ARRAY, __u32, type, n, BPF_F_MMAPABLE)
#define MFSD_PERCPU_ARRAY(name, type, n) MFSD_MAP(name, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, type, n, 0)
#define MFSD_HASH(name, ktype, vtype, n) MFSD_MAP(name, BPF_MAP_TYPE_HASH, ktype, vtype, n, 0)
#define MFSD_LOOKUP(map, key)		bpf_map_lookup_elem(&(map), key)
#define MFSD_PROGRAM			SEC("tc")
#define MFSD_CONST(type, name, value)	static const type name = value
#define MFSD_LICENSE(text)		char mfsd_license[] SEC("license") = text

#endif

/* Byte order of constants; the two compilers bring different headers for it, or none. */
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define MFSD_NET16(x) __builtin_bswap16(x)
#define MFSD_NET32(x) __builtin_bswap32(x)
#else
#define MFSD_NET16(x) ((__u16)(x))
#define MFSD_NET32(x) ((__u32)(x))
#endif

/* Adds a constant to a pointer as an immediate, whatever the compiler would rather do. */
#define MFSD_ADD(pointer, constant) asm volatile("%0 += %1" : "+r"(pointer) : "i"(constant))

/* Makes the compiler forget what it knows about a variable, so that it derives from it anew. */
#define MFSD_HIDE(v) asm volatile("" : "+r"(v))

/* Whatever is in memory is read again from here on, instead of being remembered in a register. */
#define MFSD_REREAD() asm volatile("" : : : "memory")

/* "Go on with whatever else hangs on this hook": TCX_NEXT and TC_ACT_UNSPEC are the same number on purpose
 * (include/uapi/linux/bpf.h), so one program serves TCX and clsact. */
#define MFSD_NEXT TC_ACT_UNSPEC

#endif /* MFSD_COMPAT_H */
