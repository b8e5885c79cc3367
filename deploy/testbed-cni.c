// SPDX-License-Identifier: Apache-2.0
/*
 * The CNI plugin `testbed-cni`: hands a call to the node daemon, `testbed noded`, and prints the
 * answer. All that a call does is done there (testbed/pods/cni.py).
 *
 * It is executed for every pod of a node. So it is small, static, and not in the way of pods that
 * get no guests: without the daemon their calls succeed, and those of others say what to start.
 *
 * The request: the variables CNI_*, each ended by a null byte, another null byte, the configuration.
 * The answer: the exit status as one byte, and what is to be printed.
 */
#define _GNU_SOURCE // struct ucred
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define JSMN_STRICT
#define JSMN_PARENT_LINKS
#include <jsmn.h>

#define SOCKET	 "testbed/noded" /* in the abstract namespace (unix(7)) */
#define VERSIONS "\"0.3.0\", \"0.3.1\", \"0.4.0\", \"1.0.0\", \"1.1.0\""

/* Error codes of the specification (CNI 1.1.0). */
enum { ENVIRONMENT = 4, IO = 5, DECODING = 6, UNAVAILABLE = 50 };

struct text {
	char *bytes;
	size_t length;
};

static struct {
	char *bytes;
	jsmntok_t *tokens;
	int count;
} conf;

static int fail(int code, const char *message)
{
	printf("{\"cniVersion\": \"1.0.0\", \"code\": %d, \"msg\": \"testbed-cni: %s\"}\n", code,
	       message);
	return 1;
}

/* Reads to the end; a null byte follows. */
static struct text read_all(int fd)
{
	struct text text = {0};
	ssize_t got;

	do {
		text.bytes = realloc(text.bytes, text.length + 65537);
		if (!text.bytes)
			exit(fail(IO, "no memory"));
		got = read(fd, text.bytes + text.length, 65536);
		if (got > 0)
			text.length += got;
	} while (got > 0 || (got < 0 && errno == EINTR));
	text.bytes[text.length] = 0;
	return text;
}

static bool write_all(int fd, const char *bytes, size_t length)
{
	while (length) {
		ssize_t put = send(fd, bytes, length, MSG_NOSIGNAL);

		if (put < 0 && errno != EINTR)
			return false;
		if (put > 0) {
			bytes += put;
			length -= put;
		}
	}
	return true;
}

/* --- the daemon --- */

/* A connection to the daemon; -1 if there is none. */
static int connect_daemon(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	socklen_t size = sizeof(struct ucred);
	struct ucred peer;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	memcpy(address.sun_path + 1, SOCKET, sizeof(SOCKET) - 1);
	if (fd < 0 ||
	    connect(fd, (void *)&address, offsetof(struct sockaddr_un, sun_path) + sizeof(SOCKET)))
		return -1;
	/* Abstract sockets have no permissions: anybody may listen there. */
	if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) || peer.uid)
		return -1;
	return fd;
}

static int ask_daemon(int fd, struct text configuration)
{
	extern char **environ;
	struct text answer;

	for (char **variable = environ; *variable; variable++)
		if (!strncmp(*variable, "CNI_", 4) &&
		    !write_all(fd, *variable, strlen(*variable) + 1))
			return fail(IO, "the node daemon does not read");
	if (!write_all(fd, "", 1) || !write_all(fd, configuration.bytes, configuration.length) ||
	    shutdown(fd, SHUT_WR))
		return fail(IO, "the node daemon does not read");
	answer = read_all(fd);
	if (!answer.length)
		return fail(IO, "the node daemon ended before it answered; see its log");
	fwrite(answer.bytes + 1, 1, answer.length - 1, stdout);
	return answer.bytes[0] == '0' ? 0 : 1;
}

/* --- without the daemon --- */

/* The value of an object's key; -1 if it has no such key, or there is no object. */
static int value_of(int object, const char *key)
{
	for (int i = object + 1; object >= 0 && i < conf.count; i++) {
		const jsmntok_t *t = &conf.tokens[i];

		if (t->parent == object && t->type == JSMN_STRING &&
		    t->end - t->start == (int)strlen(key) &&
		    !memcmp(conf.bytes + t->start, key, strlen(key)))
			return i + 1;
	}
	return -1;
}

static bool parse(struct text configuration)
{
	jsmn_parser parser;

	conf.bytes = configuration.bytes;
	jsmn_init(&parser);
	conf.count = jsmn_parse(&parser, configuration.bytes, configuration.length, NULL, 0);
	if (conf.count < 1 || !(conf.tokens = calloc(conf.count, sizeof(*conf.tokens))))
		return false;
	jsmn_init(&parser);
	return jsmn_parse(&parser, configuration.bytes, configuration.length, conf.tokens,
			  conf.count) == conf.count &&
	       conf.tokens[0].type == JSMN_OBJECT;
}

/* The value of KEY=VALUE;KEY=VALUE… in CNI_ARGS; empty without. */
static struct text argument(const char *key)
{
	const char *at = getenv("CNI_ARGS");

	while (at && *at) {
		size_t length = strcspn(at, ";");

		if (length > strlen(key) && !memcmp(at, key, strlen(key)) && at[strlen(key)] == '=')
			return (struct text){(char *)at + strlen(key) + 1,
					     length - strlen(key) - 1};
		at += length + (at[length] == ';');
	}
	return (struct text){"", 0};
}

/* Whether the pod gets guests, by the rules of cni.py; in doubt it does. */
static bool gets_guests(void)
{
	int guests = value_of(0, "guests"), runtime = value_of(0, "runtimeConfig"), annotated;
	struct text name = argument("K8S_POD_NAME"), namespace = argument("K8S_POD_NAMESPACE");
	const char *container = getenv("CNI_CONTAINERID");
	const jsmntok_t *folder;
	struct stat found;
	char path[4096];

	if (guests < 0 || conf.tokens[guests].type != JSMN_STRING)
		return true;
	folder = &conf.tokens[guests];
	snprintf(path, sizeof(path), "%.*s", folder->end - folder->start,
		 conf.bytes + folder->start);
	if (!stat(path, &found) && !S_ISDIR(found.st_mode))
		return true;
	annotated =
		value_of(value_of(runtime, "io.kubernetes.cri.pod-annotations"), "testbed/guests");
	if (annotated >= 0)
		return true;
	if (!name.length && container)
		name = (struct text){(char *)container, strlen(container)};
	if (!namespace.length || !strncmp(namespace.bytes, "default;", 8) ||
	    !strcmp(namespace.bytes, "default"))
		namespace.length = 0;
	snprintf(path, sizeof(path), "%.*s/%.*s/%.*s.yaml", folder->end - folder->start,
		 conf.bytes + folder->start, (int)namespace.length, namespace.bytes,
		 (int)name.length, name.bytes);
	return !stat(path, &found);
}

/* Whether guests are in the pod: their supervisor listens. */
static bool has_guests(void)
{
	const char *container = getenv("CNI_CONTAINERID");
	FILE *sockets = fopen("/proc/net/unix", "r");
	char line[4096], name[1024];
	bool found = false;

	snprintf(name, sizeof(name), "@testbed/pod/%s\n", container ? container : "");
	while (sockets && fgets(line, sizeof(line), sockets))
		found |= strlen(line) > strlen(name) &&
			 !strcmp(line + strlen(line) - strlen(name), name);
	return found;
}

static int answer_alone(const char *command)
{
	int previous = value_of(0, "prevResult");

	if (!strcmp(command, "STATUS"))
		return fail(UNAVAILABLE,
			    "the node daemon does not run; systemctl start testbed-noded");
	if (!strcmp(command, "DEL") ? has_guests() : gets_guests())
		return fail(UNAVAILABLE, "this pod has guests, and the node daemon does not run; "
					 "systemctl start testbed-noded");
	if (!strcmp(command, "ADD") && previous >= 0)
		printf("%.*s\n", conf.tokens[previous].end - conf.tokens[previous].start,
		       conf.bytes + conf.tokens[previous].start);
	return 0;
}

int main(void)
{
	const char *command = getenv("CNI_COMMAND");
	struct text configuration;
	int daemon;

	if (!command)
		return fail(ENVIRONMENT,
			    "CNI_COMMAND is not set: container runtimes call this program");
	if (!strcmp(command, "VERSION")) {
		puts("{\"cniVersion\": \"1.1.0\", \"supportedVersions\": [" VERSIONS "]}");
		return 0;
	}
	configuration = read_all(STDIN_FILENO);
	daemon = connect_daemon();
	if (daemon >= 0)
		return ask_daemon(daemon, configuration);
	if (!parse(configuration))
		return fail(DECODING, "the configuration is no JSON object");
	return answer_alone(command);
}
