/* What the programs here need of the BPF interface: helpers by number (bpf-helpers(7)) and how maps are declared for the
 * loader. Only kernel headers are used. */
#pragma once

#include <linux/bpf.h>
#include <linux/types.h>

#define SEC(name) __attribute__((section(name), used))
#define INLINE static __inline __attribute__((always_inline))
/* A field of a map's declaration: the loader reads numbers and types out of the object's BTF. */
#define NUMBER(name, value) int(*name)[value]
#define TYPE(name, value) typeof(value) *name

/* A field of the kernel's, read where it is written down and once. Otherwise clang may choose between two fields first and
 * then read through one pointer, which the verifier refuses. */
#define READ(field) (*(const volatile typeof(field) *)&(field))

static void *(*map_lookup)(void *map, const void *key) = (void *)BPF_FUNC_map_lookup_elem;
static long (*map_update)(void *map, const void *key, const void *value, __u64 flags) = (void *)BPF_FUNC_map_update_elem;
static long (*map_delete)(void *map, const void *key) = (void *)BPF_FUNC_map_delete_elem;
static __u64 (*current_uid_gid)(void) = (void *)BPF_FUNC_get_current_uid_gid;
static __u64 (*netns_cookie)(void *context) = (void *)BPF_FUNC_get_netns_cookie;
static void *(*socket_storage)(void *map, void *socket, void *value, __u64 flags) = (void *)BPF_FUNC_sk_storage_get;
static long (*socket_storage_delete)(void *map, void *socket) = (void *)BPF_FUNC_sk_storage_delete;
static long (*set_socket_option)(void *context, int level, int name, void *value, int length) = (void *)BPF_FUNC_setsockopt;
static long (*set_callbacks)(struct bpf_sock_ops *context, int flags) = (void *)BPF_FUNC_sock_ops_cb_flags_set;

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define TO_NETWORK_32(value) __builtin_bswap32(value)
#define FROM_NETWORK_32(value) __builtin_bswap32(value)
#else
#error "Only little-endian machines are served."
#endif

/* Of socket headers that belong to the C library. */
#define AF_INET 2
#define AF_INET6 10
#define SOCK_STREAM 1
#define SOL_IP 0
#define SOL_SOCKET 1
#define SOL_IPV6 41
#define SO_BINDTODEVICE 25
#define SO_ORIGINAL_DST 80
#define IPPROTO_TCP 6
#define IPPROTO_MPTCP 262

/* An Apache-2.0 program may use every helper above: none of them is for GPL programs only. */
#define LICENSE char license_name[] SEC("license") = "Apache-2.0"
