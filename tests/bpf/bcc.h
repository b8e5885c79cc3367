/* What bcc predefines, for an ordinary C compiler: so that lint can check the programs without bcc,
 * kernel headers and root, and tests can run parts of them. Only what bpf/ uses.
 */

#ifndef TESTBED_TESTS_BCC_H
#define TESTBED_TESTS_BCC_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>

#include <linux/bpf.h>
#include <linux/types.h>

typedef __u8 u8;
typedef __u16 u16;
typedef __u32 u32;
typedef __u64 u64;
typedef __s32 s32;
typedef __s64 s64;

/* linux/if.h includes sys/socket.h, which declares another one. */
#define setsockopt setsockopt_program

#undef __always_inline
#define __always_inline inline __attribute__((always_inline))

#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
#define bpf_htons(value) ((__be16)__builtin_bswap16(value))
#define bpf_htonl(value) ((__be32)__builtin_bswap32(value))
#else
#define bpf_htons(value) ((__be16)(value))
#define bpf_htonl(value) ((__be32)(value))
#endif
#define bpf_ntohs(value) bpf_htons(value)
#define bpf_ntohl(value) bpf_htonl(value)

/* Helpers of the kernel: bpf-helpers(7). */
u64 bpf_ktime_get_ns(void);
u64 bpf_get_netns_cookie(void *ctx);
int bpf_redirect(u32 ifindex, u64 flags);
int bpf_redirect_peer(u32 ifindex, u64 flags);
int bpf_clone_redirect(struct __sk_buff *skb, u32 ifindex, u64 flags);
int bpf_skb_load_bytes(const struct __sk_buff *skb, u32 offset, void *to, u32 size);
int bpf_skb_store_bytes(struct __sk_buff *skb, u32 offset, const void *from, u32 size, u64 flags);
int bpf_skb_change_tail(struct __sk_buff *skb, u32 size, u64 flags);
int bpf_skb_change_type(struct __sk_buff *skb, u32 type);
s64 bpf_csum_diff(const __be32 *from, u32 from_size, const __be32 *to, u32 to_size, __wsum seed);
int bpf_l3_csum_replace(struct __sk_buff *skb, u32 offset, u64 from, u64 to, u64 size);
int bpf_l4_csum_replace(struct __sk_buff *skb, u32 offset, u64 from, u64 to, u64 flags);
struct bpf_sock *bpf_skc_lookup_tcp(void *ctx, struct bpf_sock_tuple *tuple, u32 size, u64 netns,
				    u64 flags);
struct bpf_sock *bpf_sk_lookup_udp(void *ctx, struct bpf_sock_tuple *tuple, u32 size, u64 netns,
				   u64 flags);
int bpf_sk_assign(struct __sk_buff *skb, struct bpf_sock *sk, u64 flags);
int bpf_sk_release(struct bpf_sock *sk);
void *bpf_map_lookup_elem(void *map, const void *key);

/* Maps: what looks like a method becomes a call of a helper when bcc rewrites it. */
#define BPF_TABLE(type, key_type, leaf_type, name, max_entries)                                    \
	struct name##_table {                                                                      \
		leaf_type *(*lookup)(key_type *);                                                  \
		int (*insert)(key_type *, leaf_type *);                                            \
		int (*delete)(key_type *);                                                         \
		void *(*sk_storage_get)(void *, void *, u64);                                      \
		char entries[(max_entries) >= 0 ? 1 : -1];                                         \
	} name

#define BPF_F_TABLE(type, key_type, leaf_type, name, max_entries, flags)                           \
	BPF_TABLE(type, key_type, leaf_type, name, max_entries)
#define BPF_ARRAY_OF_MAPS(name, inner_name, max_entries)                                           \
	BPF_TABLE("array_of_maps", u32, u32, name, max_entries)

#define BPF_HASH(name, key_type, leaf_type, max_entries)                                           \
	BPF_TABLE("hash", key_type, leaf_type, name, max_entries)
#define BPF_ARRAY(name, leaf_type, max_entries)                                                    \
	BPF_TABLE("array", u32, leaf_type, name, max_entries)
#define BPF_PERCPU_ARRAY(name, leaf_type, max_entries)                                             \
	BPF_TABLE("percpu_array", u32, leaf_type, name, max_entries)
#define BPF_SK_STORAGE(name, leaf_type) BPF_TABLE("sk_storage", u32, leaf_type, name, 0)

#define BPF_RINGBUF_OUTPUT(name, pages)                                                            \
	struct name##_table {                                                                      \
		void *(*ringbuf_reserve)(u64);                                                     \
		void (*ringbuf_submit)(void *, u64);                                               \
		char entries[(pages) > 0 ? 1 : -1];                                                \
	} name

#endif
