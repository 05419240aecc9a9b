/* Acceleration of plaintext between two sockets of one host: what one sends is put into the other's queue, and TCP sees
 * nothing of it.
 *
 *   sockops    a connection within this host, to a port of the plan, is established: both its sockets go into the table
 *   sk_msg     a socket of the table sends: if the other end is there, it gets the bytes; if not, they go by TCP */
#include "bpf.h"

#define MAX_PORTS 512
/* Sockets, two for each connection. What finds no room goes by TCP. */
#define MAX_ENDS 32768

#define PASS 1

/* src/accelerate/programs.rs writes the same bytes. */
struct plan {
	/* Cookie of the network namespace. */
	__u64 netns;
	__u32 port_count;
	__u32 reserved;
	/* Host byte order: at which plaintext is served, by the proxy or by the workload. */
	__u16 ports[MAX_PORTS];
};

const volatile struct plan plan SEC(".rodata");

/* One end of a connection. */
struct end {
	__u64 netns;
	__u32 local[4];
	__u32 remote[4];
	/* Host byte order. */
	__u32 local_port;
	__u32 remote_port;
};

struct {
	NUMBER(type, BPF_MAP_TYPE_SOCKHASH);
	NUMBER(max_entries, MAX_ENDS);
	TYPE(key, struct end);
	TYPE(value, __u32);
} ends SEC(".maps");

INLINE int is_planned(__u32 port)
{
	for (__u32 i = 0; i < MAX_PORTS && i < plan.port_count; i++)
		if (plan.ports[i] == port)
			return 1;
	return 0;
}

INLINE int is_same(const __u32 one[4], const __u32 other[4])
{
	return one[0] == other[0] && one[1] == other[1] && one[2] == other[2] && one[3] == other[3];
}

SEC("sockops")
int accelerate_sockops(struct bpf_sock_ops *context)
{
	__u32 op = context->op;
	struct end end = {};

	if (op != BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB && op != BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB)
		return PASS;
	if (context->family != AF_INET && context->family != AF_INET6)
		return PASS;
	end.netns = netns_cookie(context);
	end.local_port = context->local_port;
	end.remote_port = FROM_NETWORK_32(context->remote_port);
	if (end.netns != plan.netns ||
	    !is_planned(op == BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB ? end.remote_port : end.local_port))
		return PASS;
	SOCKET_ADDRESS(end.local, context->family, context->local_ip4, context->local_ip6);
	SOCKET_ADDRESS(end.remote, context->family, context->remote_ip4, context->remote_ip6);
	if (is_same(end.local, end.remote) || is_loopback(end.remote) || is_loopback(end.local))
		socket_hash_update(context, &ends, &end, BPF_ANY);
	return PASS;
}

SEC("sk_msg")
int accelerate_message(struct sk_msg_md *context)
{
	struct end other = {};

	other.netns = plan.netns;
	other.local_port = FROM_NETWORK_32(context->remote_port);
	other.remote_port = context->local_port;
	SOCKET_ADDRESS(other.local, context->family, context->remote_ip4, context->remote_ip6);
	SOCKET_ADDRESS(other.remote, context->family, context->local_ip4, context->local_ip6);
	redirect_message(context, &ends, &other, BPF_F_INGRESS);
	return SK_PASS;
}

LICENSE;
