/* Outbound capture: TCP that the workload opens goes to the proxy, which learns the destination that was asked for.
 *
 *   connect4/6      a new connection: exempt ones pass; of others the destination is stored with the socket, and the
 *                   connection goes to the proxy's port on this host. What cannot be stored is refused (EPERM).
 *   sockops         at TCP connect, before the SYN leaves (it may carry data: TCP Fast Open, RFC 7413), the destination is
 *                   laid down under the client's address and port; the socket that the proxy will accept takes it up when
 *                   it is established.
 *   getsockopt      the proxy asks for SO_ORIGINAL_DST on the accepted socket and is answered as by REDIRECT.
 *   getpeername4/6  the workload sees the destination that it asked for.
 */
#include "bpf.h"

/* Whatever a config can declare fits (src/config/validate/intercept.rs). */
#define MAX_USERS 288
#define MAX_DESTINATIONS 544
/* Connections whose destination waits for its socket, or whose client may still ask (MPTCP). 2 MiB of kernel memory. */
#define MAX_CLIENTS 16384

#define REFUSE 0
#define PASS 1

enum family { V4 = 1, V6 = 2 };

/* Reached directly. */
struct destination {
	__u32 address[4];
	__u32 mask[4];
	/* Host byte order, both ends included. */
	__u16 first_port;
	__u16 last_port;
	/* Set of enum family: ::/0 does not mean IPv4. */
	__u32 families;
};

/* What the loader fills in; the kernel freezes it before a program runs. src/intercept/ebpf/bytes.rs writes the same
 * bytes. */
struct plan {
	/* Cookie of the network namespace that is captured. Sockets of others pass. */
	__u64 netns;
	/* Of the proxy, network byte order, at 127.0.0.1 and ::1. */
	__u32 port;
	__u32 has_mark;
	__u32 mark;
	__u32 uid_count;
	__u32 gid_count;
	__u32 destination_count;
	__u32 uids[MAX_USERS];
	__u32 gids[MAX_USERS];
	struct destination destinations[MAX_DESTINATIONS];
};

const volatile struct plan plan SEC(".rodata");

enum side { CLIENT = 1, ACCEPTED = 2 };

struct original {
	__u32 address[4];
	__u16 port;
	__u16 side;
};

/* A client socket as its peer sees it. */
struct client {
	__u64 netns;
	__u32 address[4];
	/* Host byte order. */
	__u32 port;
	__u32 reserved;
};

/* Lives and dies with its socket. */
struct {
	NUMBER(type, BPF_MAP_TYPE_SK_STORAGE);
	NUMBER(map_flags, BPF_F_NO_PREALLOC);
	TYPE(key, int);
	TYPE(value, struct original);
} originals SEC(".maps");

struct {
	NUMBER(type, BPF_MAP_TYPE_LRU_HASH);
	NUMBER(max_entries, MAX_CLIENTS);
	TYPE(key, struct client);
	TYPE(value, struct original);
} clients SEC(".maps");

INLINE int is_exempt_user(void)
{
	__u64 both = current_uid_gid();
	__u32 uid = both, gid = both >> 32;

	for (__u32 i = 0; i < MAX_USERS && i < plan.uid_count; i++)
		if (plan.uids[i] == uid)
			return 1;
	for (__u32 i = 0; i < MAX_USERS && i < plan.gid_count; i++)
		if (plan.gids[i] == gid)
			return 1;
	return 0;
}

INLINE int is_exempt_destination(const __u32 address[4], __u16 port)
{
	__u32 family = is_mapped(address) ? V4 : V6;
	__u16 number = __builtin_bswap16(port);

	for (__u32 i = 0; i < MAX_DESTINATIONS && i < plan.destination_count; i++)
		if ((plan.destinations[i].families & family) &&
		    number >= plan.destinations[i].first_port && number <= plan.destinations[i].last_port &&
		    (address[0] & plan.destinations[i].mask[0]) == plan.destinations[i].address[0] &&
		    (address[1] & plan.destinations[i].mask[1]) == plan.destinations[i].address[1] &&
		    (address[2] & plan.destinations[i].mask[2]) == plan.destinations[i].address[2] &&
		    (address[3] & plan.destinations[i].mask[3]) == plan.destinations[i].address[3])
			return 1;
	return 0;
}

INLINE int is_tcp(struct bpf_sock_addr *context)
{
	return context->type == SOCK_STREAM &&
	       (context->protocol == IPPROTO_TCP || context->protocol == IPPROTO_MPTCP);
}

enum verdict { EXEMPT, CAPTURED, FAILED };

INLINE enum verdict judge(struct bpf_sock_addr *context, const __u32 address[4])
{
	struct original original = {.port = context->user_port, .side = CLIENT};
	struct original *stored;

	if (!is_tcp(context) || netns_cookie(context) != plan.netns)
		return EXEMPT;
	if (!context->sk)
		return FAILED;
	/* Programs of a cgroup below may have sent it there already. */
	if (is_loopback(address) && context->user_port == plan.port)
		return EXEMPT;
	if (is_loopback(address) || is_exempt_user() || (plan.has_mark && context->sk->mark == plan.mark) ||
	    is_exempt_destination(address, context->user_port)) {
		/* A socket may be connected again (connect(2), AF_UNSPEC). */
		socket_storage_delete(&originals, context->sk);
		return EXEMPT;
	}
	copy_address(original.address, address);
	stored = socket_storage(&originals, context->sk, &original, BPF_SK_STORAGE_GET_F_CREATE);
	if (!stored)
		return FAILED;
	*stored = original;
	/* A socket that is bound to another device would not reach loopback. */
	if (context->sk->bound_dev_if) {
		__u32 none = 0;
		set_socket_option(context, SOL_SOCKET, SO_BINDTODEVICE, &none, sizeof(none));
	}
	return CAPTURED;
}

SEC("cgroup/connect4")
int capture_connect4(struct bpf_sock_addr *context)
{
	__u32 address[4];

	map_address(address, context->user_ip4);
	switch (judge(context, address)) {
	case EXEMPT:
		return PASS;
	case CAPTURED:
		context->user_ip4 = TO_NETWORK_32(0x7f000001);
		context->user_port = plan.port;
		return PASS;
	default:
		return REFUSE;
	}
}

SEC("cgroup/connect6")
int capture_connect6(struct bpf_sock_addr *context)
{
	__u32 address[4] = {context->user_ip6[0], context->user_ip6[1], context->user_ip6[2], context->user_ip6[3]};

	switch (judge(context, address)) {
	case EXEMPT:
		return PASS;
	case CAPTURED:
		if (is_mapped(address)) {
			context->user_ip6[3] = TO_NETWORK_32(0x7f000001);
		} else {
			context->user_ip6[0] = 0;
			context->user_ip6[1] = 0;
			context->user_ip6[2] = 0;
			context->user_ip6[3] = TO_NETWORK_32(1);
		}
		context->user_port = plan.port;
		return PASS;
	default:
		return REFUSE;
	}
}

/* If the map is full of newer entries, the proxy finds no destination and refuses the connection. */
SEC("sockops")
int capture_sockops(struct bpf_sock_ops *context)
{
	__u32 op = context->op;
	struct bpf_sock *sk = context->sk;
	struct original *original, copy;
	struct client client = {};

	if (!sk || (context->family != AF_INET && context->family != AF_INET6))
		return PASS;
	if (op == BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB) {
		/* A client's port may be in use towards other servers, too. */
		if (context->local_port != __builtin_bswap16(plan.port))
			return PASS;
		client.netns = netns_cookie(context);
		client.port = FROM_NETWORK_32(context->remote_port);
		SOCKET_ADDRESS(client.address, context->family, context->remote_ip4, context->remote_ip6);
		original = map_lookup(&clients, &client);
		if (!original)
			return PASS;
		copy = *original;
		copy.side = ACCEPTED;
		socket_storage(&originals, sk, &copy, BPF_SK_STORAGE_GET_F_CREATE);
		return PASS;
	}
	if (op != BPF_SOCK_OPS_TCP_CONNECT_CB && (op != BPF_SOCK_OPS_STATE_CB || context->args[1] != BPF_TCP_CLOSE))
		return PASS;
	original = socket_storage(&originals, sk, 0, 0);
	if (!original || original->side != CLIENT)
		return PASS;
	client.netns = netns_cookie(context);
	client.port = context->local_port;
	SOCKET_ADDRESS(client.address, context->family, context->local_ip4, context->local_ip6);
	if (op == BPF_SOCK_OPS_TCP_CONNECT_CB) {
		copy = *original;
		map_update(&clients, &client, &copy, BPF_ANY);
		set_callbacks(context, context->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_STATE_CB_FLAG);
	} else {
		map_delete(&clients, &client);
	}
	return PASS;
}

struct sockaddr_v4 {
	__u16 family;
	__u16 port;
	__u32 address;
	__u8 zero[8];
};

struct sockaddr_v6 {
	__u16 family;
	__u16 port;
	__u32 flow;
	__u32 address[4];
	__u32 scope;
};

/* Runs after the kernel's own answer, also where that was an error: without conntrack it is ENOENT or ENOPROTOOPT. */
SEC("cgroup/getsockopt")
int capture_getsockopt(struct bpf_sockopt *context)
{
	struct original *original;

	if (context->optname != SO_ORIGINAL_DST || (context->level != SOL_IP && context->level != SOL_IPV6) || !context->sk)
		return PASS;
	original = socket_storage(&originals, context->sk, 0, 0);
	if (!original || original->side != ACCEPTED)
		return PASS;
	if (context->level == SOL_IP) {
		struct sockaddr_v4 *answer = context->optval;

		if (!is_mapped(original->address) || (void *)(answer + 1) > context->optval_end)
			return PASS;
		answer->family = AF_INET;
		answer->port = original->port;
		answer->address = original->address[3];
		__builtin_memset(answer->zero, 0, sizeof(answer->zero));
		context->optlen = sizeof(*answer);
	} else {
		struct sockaddr_v6 *answer = context->optval;

		if (is_mapped(original->address) || (void *)(answer + 1) > context->optval_end)
			return PASS;
		answer->family = AF_INET6;
		answer->port = original->port;
		answer->flow = 0;
		copy_address(answer->address, original->address);
		answer->scope = 0;
		context->optlen = sizeof(*answer);
	}
	context->retval = 0;
	return PASS;
}

/* Of an MPTCP socket only the subflow has met connect4/6; it is found by its address. */
INLINE struct original *asked_for(struct bpf_sock_addr *context)
{
	struct original *original;
	struct client client = {};
	struct bpf_sock *sk = context->sk;

	if (!sk || !is_tcp(context))
		return 0;
	original = socket_storage(&originals, sk, 0, 0);
	if (!original && context->user_port == plan.port) {
		client.netns = netns_cookie(context);
		client.port = sk->src_port;
		SOCKET_ADDRESS(client.address, sk->family, sk->src_ip4, sk->src_ip6);
		original = map_lookup(&clients, &client);
	}
	return original && original->side == CLIENT ? original : 0;
}

SEC("cgroup/getpeername4")
int capture_getpeername4(struct bpf_sock_addr *context)
{
	struct original *original = asked_for(context);

	if (original && is_mapped(original->address)) {
		context->user_ip4 = original->address[3];
		context->user_port = original->port;
	}
	return PASS;
}

SEC("cgroup/getpeername6")
int capture_getpeername6(struct bpf_sock_addr *context)
{
	struct original *original = asked_for(context);

	if (original) {
		context->user_ip6[0] = original->address[0];
		context->user_ip6[1] = original->address[1];
		context->user_ip6[2] = original->address[2];
		context->user_ip6[3] = original->address[3];
		context->user_port = original->port;
	}
	return PASS;
}

LICENSE;
