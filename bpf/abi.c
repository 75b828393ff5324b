// SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0)
/*
 * abi.c - never loaded. It only makes clang put every type of mfsd.h into BTF, from which scripts/build.py writes
 * mfsd/datapath/_abi.py. What the classifier itself uses is compared with that file again by the tests.
 */
#include "mfsd.h"

struct mfsd_slot abi_slot;
struct mfsd_tuple abi_tuple;
struct mfsd_host abi_host;
struct mfsd_dev abi_dev;
struct mfsd_counter abi_counter;
struct mfsd_owner abi_owner;
struct mfsd_sock abi_sock;
struct mfsd_event abi_event;
struct mfsd_rule abi_rule;
struct mfsd_rules_of abi_rules_of;
struct mfsd_yield abi_yield;
struct mfsd_path_key abi_path_key;
struct mfsd_peer_clock abi_peer_clock;
struct mfsd_path abi_path;
struct mfsd_far abi_far;
struct mfsd_adopted abi_adopted;

enum mfsd_consts abi_consts;
enum mfsd_host_flags abi_host_flags;
enum mfsd_dev_flags abi_dev_flags;
enum mfsd_slot_flags abi_slot_flags;
enum mfsd_stat abi_stat;
enum mfsd_event_kind abi_event_kind;
enum mfsd_event_flags abi_event_flags;
enum mfsd_yield_class abi_yield_class;
enum mfsd_yield_flags abi_yield_flags;
