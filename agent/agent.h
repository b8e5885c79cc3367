/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The traffic agent: serves and generates TCP and UDP traffic, and scores it at the receiver. The
 * same program runs as a process, in a network namespace, in a Linux guest and in an OSv unikernel.
 *
 *   main.c       control connections: orders in JSON, one per line (the protocol is in README.md)
 *   order.c      reads the keys of an order, or refuses it
 *   server.c     the server end             client.c     the client end, which carries out a run
 *   stream.c     sends and receives streams, for either end
 *   open_loop.c  requests at a given rate
 *   net.c        sockets, time, the pattern of the payload
 *   sockets.c    single socket calls, one per order
 *   http.c       a client of web servers
 *   histogram.c  latencies                  json.c       flat JSON
 *
 * It needs libc alone: plain sockets, poll, pthreads and clock_gettime, which OSv has, too. Where
 * unshare() exists, threads have file descriptors of their own (`own_files`).
 * _GNU_SOURCE stays undefined: newer glibc would bind strtod and its kin to names that OSv lacks.
 */
#ifndef AGENT_H
#define AGENT_H

#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/socket.h>
#include <sys/types.h>

#define AGENT_VERSION "1"
#define CONTROL_PORT  4700

#define SECOND_NS     1000000000ull
#define LIMIT_NS      (5 * SECOND_NS) /* a run ends after so long without progress */
#define TICK_NS	      (SECOND_NS / 4) /* period in which a waiting thread checks for its end */
#define LATE_NS	      4000000ull      /* longest delay that a paced sender catches up with */
#define SPIN_NS	      100000ull	      /* a thread wakes up so long before its time, then spins */
#define MAX_MESSAGE   (1u << 20)      /* bytes of one write, request or response over TCP */
#define MAX_DATAGRAM  65507u
#define MAX_STREAMS   64
#define CHUNK	      (128u << 10) /* bytes of one read from a TCP stream */
#define MAX_PENDING   16384	   /* requests of a stream that are due and not answered */
#define SAMPLE_EVERY  16	   /* outside of warm-up, one buffer in so many is checked */
#define SAMPLE_BYTES  64

#define MIN(a, b)     ((a) < (b) ? (a) : (b))

/* Declared by poll.h only with _GNU_SOURCE. */
extern int ppoll(struct pollfd *fds, nfds_t count, const struct timespec *limit,
		 const sigset_t *signals);

/* --- format of data connections; integers are big endian --- */

enum mode { STREAM_UP = 1, STREAM_DOWN, REQUEST_RESPONSE };

#define MAGIC 0x74626137u /* "tba7" */

/* First bytes of a TCP connection, or the body of a datagram of type OPEN. */
struct order {
	uint32_t magic;
	uint32_t mode;
	uint32_t size;	    /* bytes per write, datagram, request and response */
	uint32_t phase;	    /* offset in the pattern at which the stream's payload begins */
	uint64_t warmup_ns; /* time after the receiver's start from which it scores */
	uint64_t bytes;	    /* length of a stream; 0: until the client ends it */
	uint64_t rate_bps;  /* UDP streams: payload bits per second; 0: as fast as possible */
};

/* The receiver's score: answer to a stream up, over TCP or as the body of a REPORT. */
struct report {
	uint64_t bytes;
	uint64_t elapsed_ns;
	uint64_t datagrams;
	uint64_t lost;
	uint64_t reordered;
	uint64_t corrupt;
};

enum datagram_type { OPEN = 1, READY, DATA, END, REPORT, ALIVE, DONE, REQUEST, RESPONSE };

/* Header of every datagram. It is included in `size_bytes` of an order. */
struct datagram {
	uint32_t type;	   /* MAGIC ^ enum datagram_type */
	uint32_t flow;	   /* random number of a stream, from the client */
	uint64_t sequence; /* DATA: number of the datagram, from 0; END: how many DATA were sent */
};

void order_swap(struct order *o); /* host to network order, or back */
void report_swap(struct report *r);

/* --- net.c --- */

struct endpoint {
	bool udp;
	int family; /* AF_INET, AF_INET6 */
};

union address {
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

uint64_t now_ns(void);
void pause_ns(uint64_t ns);
void spin_ns(uint64_t ns);
void pattern_init(void);
const unsigned char *pattern_at(uint64_t offset);
bool intact(const void *payload, size_t length, uint64_t offset, bool fully, uint64_t nth);

socklen_t address_size(const union address *a);
void address_text(const union address *a, char text[static INET6_ADDRSTRLEN]);
bool address_parse(const char *text, union address *a);
unsigned address_port(const union address *a);
void address_set_port(union address *a, unsigned port);

/* These return a socket, or -1 with errno. */
int listen_at(struct endpoint e, union address *at);
int dial(struct endpoint e, const union address *to);
void set_timeouts(int fd); /* a tick for send and receive; accepted sockets inherit them */
void wait_untimed(int fd); /* until the peer's machine is gone for 10 s; no time-out of receive,
			      whose timer takes 1 % of a transaction */
void set_option(int fd, int level, int name, int value);
void close_by_reset(int fd);

bool would_block(int error);

/*
 * Return the bytes moved; 0 at the end (receive only); -1 with errno: EAGAIN after 5 s without
 * progress, ECANCELED if `*stop` is true (unless `stop` is NULL). `*stop` is read after each tick,
 * and after `wake`.
 */
ssize_t receive_some(int fd, void *buffer, size_t length, const atomic_bool *stop);
ssize_t send_some(int fd, const void *buffer, size_t length, const atomic_bool *stop);
/* Return 0, or -1 with errno; ECONNRESET also if the peer ends the stream too early. */
int receive_all(int fd, void *buffer, size_t length, const atomic_bool *stop);
int send_all(int fd, const void *buffer, size_t length, const atomic_bool *stop);
int send_both(int fd, const void *head, size_t head_length, const void *body, size_t length,
	      const union address *to);
const char *reason(int error);
int start_thread(pthread_t *thread, void *(*run)(void *), void *argument);
void wait_a_tick(pthread_cond_t *condition, pthread_mutex_t *lock); /* at most a tick */

/*
 * Gives the calling thread a table of file descriptors of its own, with only `fd` (-1: none) in it.
 * Returns whether the system can do so; then the thread has to close its copy of `fd`. In a table
 * that threads share, each call on a socket takes and drops a reference to it, which costs some
 * percent of a transaction.
 */
bool own_files(int fd);

/*
 * `wake` interrupts the call in which a thread waits, if it has descriptors of its own: then nobody
 * else can shut its sockets down. The thread may be about to wait, so repeat it until the thread
 * ends. `be_woken` has to be called before.
 */
void be_woken(void);
void wake(pthread_t thread);

/* --- stream.c --- */

struct score {
	bool measuring;
	uint64_t begin_ns, first_ns, last_ns; /* start; begin and end of the scored time */
	uint64_t total;			      /* bytes (TCP), datagrams (UDP), with the warm-up */
	uint64_t next, first_sequence;	      /* UDP: highest sequence + 1; first scored sequence */
	struct report is;
};

void score_start(struct score *s, const struct order *o);
void score_datagram(struct score *s, const struct order *o, const struct datagram *head,
		    size_t length);
void score_finish(struct score *s, uint64_t sent);

/* A sender of datagrams. It stops if nothing was heard from the other end for LIMIT_NS. */
struct sender {
	int fd;
	const union address *to; /* NULL: connected */
	struct order order;
	uint32_t flow;
	_Atomic uint64_t heard_ns; /* last time that the other end was heard; 0: it wants no more */
	uint64_t sent;		   /* datagrams */
};

int tcp_send(int fd, const struct order *o, uint64_t until_ns, const atomic_bool *stop);
int tcp_receive(int fd, const struct order *o, uint64_t until_ns, struct score *s, void *buffer,
		const atomic_bool *stop);
int udp_send(struct sender *s, uint64_t until_ns);
int datagram_send(int fd, const union address *to, enum datagram_type type, uint32_t flow,
		  uint64_t sequence, const void *body, size_t length);
enum datagram_type datagram_type(const struct datagram *head, ssize_t length);

/* --- histogram.c --- */

/* The width of a bucket is at most 1/128 of its value. The last has 68 s and all above. */
#define HISTOGRAM_BUCKETS ((29 << 7) + 128)

struct histogram {
	uint64_t count[HISTOGRAM_BUCKETS];
};

void histogram_add(struct histogram *h, uint64_t ns);
uint64_t histogram_upper_ns(unsigned bucket);		    /* highest value of the bucket */
void histogram_print(const struct histogram *h, FILE *out); /* [upper bound in us,count],... */
void histogram_merge(struct histogram *into, const struct histogram *from);

/* --- json.c --- */

struct json {
	unsigned count;
	const char *fault; /* why the line was refused */
	struct member {
		const char *key;
		const char *text; /* NULL: a number */
		double number;
		bool used;
	} member[24];
};

bool json_parse(struct json *j, char *line);
const char *json_text(struct json *j, const char *key);
const struct member *json_number(struct json *j, const char *key);
const char *json_unused(const struct json *j);
void json_quote(FILE *out, const char *text);
void print_fault(FILE *out, const char *fault); /* the answer to an order that failed */

/* --- order.c --- */

#define MAX_SERVERS 64
#define MAX_SOCKETS 4096

struct server;

/* A control connection. Its servers and sockets end with it. */
struct session {
	int fd;
	FILE *out;
	struct json order;
	struct server *server[MAX_SERVERS];
	struct held {
		int fd; /* descriptor + 1; 0: the entry is free */
		bool udp;
	} held[MAX_SOCKETS];
	unsigned char *buffer; /* MAX_MESSAGE bytes, allocated at first use */
	char fault[256];
};

/* These read a key of the order. If it is wrong, they set the fault and return false. */
bool refuse(struct session *s, const char *what, const char *why);
bool take_word(struct session *s, const char *key, const char *const *words, unsigned *which);
bool take_number(struct session *s, const char *key, double low, double high, double *value);
bool take_endpoint(struct session *s, struct endpoint *e);
bool taken_all(struct session *s); /* refuses an order with keys that nobody has read */

/* --- sockets.c --- */

bool socket_order(struct session *s, const char *op);
void close_sockets(struct session *s);

/* --- server.c --- */

/* Returns NULL with errno on failure. The server waits for `delay_ns` before each response. */
struct server *server_start(struct endpoint e, union address *at, uint64_t delay_ns);
void server_stop(struct server *s); /* returns when its threads have ended and the port is free */

/* --- client.c --- */

enum kind { STREAM, RR, CRR };

struct run {
	struct endpoint endpoint;
	enum kind kind;
	const char *host;
	unsigned port;
	unsigned streams;
	uint64_t duration_ns; /* 0: until `order.bytes` are moved */
	uint64_t gap_ns;      /* between requests of a stream; 0: each after the last response */
	struct order order;
};

/* A stream of a run. */
struct stream {
	const struct run *run;
	struct group *group;
	const union address *to;
	struct order order;
	uint32_t flow;
	int fd;
	void *buffer;
	struct datagram *request;
	uint64_t *due_ns; /* open loop: of request n at n % MAX_PENDING; 0: answered */
	struct histogram *latency;
	struct report is;
	uint64_t transactions, errors, unanswered, unsent;
	char fault[256];		  /* empty: none */
	bool own;			  /* the thread has descriptors of its own */
	atomic_uint_fast64_t progress_ns; /* closed loop: time of the last transaction */
	atomic_bool stalled;		  /* that is too long ago: the thread has to give up */
	pthread_t thread;
};

/* Carries out a run, and writes one line of JSON: the result, or what failed. */
void run(const struct run *r, FILE *out);
void fail(struct stream *s, const char *what, const char *why);
int resolve(const struct run *r, union address *to, const char **why); /* 0, or why not */
uint64_t wait_until(uint64_t due_ns); /* sleeps, then spins, as sleep alone is too coarse */

/* --- open_loop.c --- */

/* Sends requests when they are due, whether those before are answered or not. */
void open_loop(struct stream *s);

/* --- http.c --- */

struct web {
	struct run run; /* endpoint, host, port, connections (`streams`), duration */
	const char *path;
	double rate_per_s; /* of all connections together; 0: each asks when it was answered */
};

/* Asks a web server, and writes one line of JSON: the result, or what failed. */
void ask_web(const struct web *order, FILE *out);

#endif
