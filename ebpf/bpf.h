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
static long (*socket_hash_update)(struct bpf_sock_ops *context, void *map, void *key, __u64 flags) = (void *)BPF_FUNC_sock_hash_update;
static long (*redirect_message)(struct sk_msg_md *context, void *map, void *key, __u64 flags) = (void *)BPF_FUNC_msg_redirect_hash;
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

/* Addresses are kept as IPv6, IPv4 as v4-mapped (RFC 4291, section 2.5.5.2), so that one socket family cannot walk round a
 * rule that is written in the other's terms. All is in network byte order unless a line says otherwise. */

INLINE int is_mapped(const __u32 address[4])
{
	return address[0] == 0 && address[1] == 0 && address[2] == TO_NETWORK_32(0xffff);
}

/* 127.0.0.0/8, ::1, and the unspecified addresses, which mean loopback to connect(2). */
INLINE int is_loopback(const __u32 address[4])
{
	if (is_mapped(address))
		return address[3] == 0 || (address[3] & TO_NETWORK_32(0xff000000)) == TO_NETWORK_32(0x7f000000);
	return address[0] == 0 && address[1] == 0 && address[2] == 0 &&
	       (address[3] == 0 || address[3] == TO_NETWORK_32(1));
}

INLINE void map_address(__u32 address[4], __u32 v4)
{
	address[0] = 0;
	address[1] = 0;
	address[2] = TO_NETWORK_32(0xffff);
	address[3] = v4;
}

INLINE void copy_address(__u32 to[4], const __u32 from[4])
{
	to[0] = from[0];
	to[1] = from[1];
	to[2] = from[2];
	to[3] = from[3];
}

/* Both forms are read, and then one is taken: see READ. */
#define SOCKET_ADDRESS(address, family, v4, v6)                                                      \
	do {                                                                                         \
		__u32 four = READ(v4);                                                               \
		__u32 six[4] = {READ((v6)[0]), READ((v6)[1]), READ((v6)[2]), READ((v6)[3])};         \
                                                                                                     \
		if ((family) == AF_INET)                                                             \
			map_address(six, four);                                                      \
		copy_address(address, six);                                                          \
	} while (0)
