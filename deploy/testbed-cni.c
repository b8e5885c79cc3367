// SPDX-License-Identifier: Apache-2.0
/*
 * The CNI plugin `testbed-cni`: hands calls for pods with guests to the node daemon, `testbed
 * noded`, and prints its answers. All that such a call does is done there (testbed/pods/cni.py).
 *
 * It is executed for every pod of a host. So it is small and static, and answers by itself for pods
 * that get no guests, whether the daemon runs or not.
 *
 * The request: the variables CNI_*, each ended by a null byte, another null byte, the configuration.
 * The answer: the exit status as one byte, and what is to be printed.
 */
#define _GNU_SOURCE // struct ucred
#include <errno.h>
#include <glob.h>
#include <poll.h>
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

#define FOLDER	 "/run/testbed" /* only root enters it (testbed/host/ledger.py) */
#define VERSIONS "\"0.3.0\", \"0.3.1\", \"0.4.0\", \"1.0.0\", \"1.1.0\""
#define START	 "; systemctl start testbed-noded"

/* Error codes of the specification (CNI 1.1.0). */
enum { ENVIRONMENT = 4, IO = 5, DECODING = 6, INVALID = 7, LATER = 11, UNAVAILABLE = 50 };

struct text {
	const char *bytes;
	size_t length;
};

/* The configuration. */
static struct {
	struct text text;
	jsmntok_t *tokens;
	int count;
} conf;

/* The value of an object's key; -1 if it has no such key, or there is no object. */
static int value_of(int object, const char *key)
{
	for (int i = object + 1; object >= 0 && i + 1 < conf.count; i++) {
		const jsmntok_t *t = &conf.tokens[i];

		if (t->parent == object && t->type == JSMN_STRING && t->size == 1 &&
		    t->end - t->start == (int)strlen(key) &&
		    !memcmp(conf.text.bytes + t->start, key, strlen(key)))
			return i + 1;
	}
	return -1;
}

static struct text text_of(int token)
{
	const jsmntok_t *t = &conf.tokens[token];

	return (struct text){conf.text.bytes + t->start, t->end - t->start};
}

static struct text version(void)
{
	int given = value_of(0, "cniVersion");

	if (given < 0 || conf.tokens[given].type != JSMN_STRING)
		return (struct text){"1.1.0", 5};
	return text_of(given);
}

static int fail(int code, const char *message, const char *hint)
{
	struct text v = version();

	printf("{\"cniVersion\": \"%.*s\", \"code\": %d, \"msg\": \"testbed-cni: %s%s\"}\n",
	       (int)v.length, v.bytes, code, message, hint);
	return 1;
}

/* Reads to the end; a null byte follows. */
static struct text read_all(int fd)
{
	char *bytes = NULL;
	size_t length = 0;
	ssize_t got;

	do {
		bytes = realloc(bytes, length + 65537);
		if (!bytes)
			exit(fail(IO, "no memory", ""));
		got = read(fd, bytes + length, 65536);
		if (got > 0)
			length += got;
	} while (got > 0 || (got < 0 && errno == EINTR));
	bytes[length] = 0;
	return (struct text){bytes, length};
}

static bool parse(struct text configuration)
{
	jsmn_parser parser;
	int count;

	conf.text = configuration;
	jsmn_init(&parser);
	count = jsmn_parse(&parser, configuration.bytes, configuration.length, NULL, 0);
	if (count < 1 || !(conf.tokens = calloc(count, sizeof(*conf.tokens))))
		return false;
	jsmn_init(&parser);
	if (jsmn_parse(&parser, configuration.bytes, configuration.length, conf.tokens, count) !=
	    count)
		return false;
	conf.count = count;
	return conf.tokens[0].type == JSMN_OBJECT;
}

/* --- which pods have guests --- */

/* The value of KEY=VALUE;KEY=VALUE… in CNI_ARGS, the last if there are several; empty without. */
static struct text argument(const char *key)
{
	const char *at = getenv("CNI_ARGS");
	struct text found = {"", 0};

	while (at && *at) {
		size_t length = strcspn(at, ";"), named = strlen(key);

		if (length > named && !memcmp(at, key, named) && at[named] == '=')
			found = (struct text){at + named + 1, length - named - 1};
		at += length + (at[length] == ';');
	}
	return found;
}

static bool is(struct text text, const char *word)
{
	return text.length == strlen(word) && !memcmp(text.bytes, word, text.length);
}

/* Whether the pod is to get guests, by the rules of cni.py; in doubt it does. */
static bool gets_guests(void)
{
	int guests = value_of(0, "guests"), runtime = value_of(0, "runtimeConfig");
	struct text name = argument("K8S_POD_NAME"), namespace = argument("K8S_POD_NAMESPACE");
	const char *container = getenv("CNI_CONTAINERID");
	struct text folder;
	struct stat found;
	char path[4096];

	if (guests < 0 || conf.tokens[guests].type != JSMN_STRING)
		return true; /* a manifest for all pods */
	folder = text_of(guests);
	if (memchr(folder.bytes, '\\', folder.length))
		return true;
	snprintf(path, sizeof(path), "%.*s", (int)folder.length, folder.bytes);
	if (stat(path, &found) || !S_ISDIR(found.st_mode))
		return true;
	if (value_of(value_of(runtime, "io.kubernetes.cri.pod-annotations"), "testbed/guests") >= 0)
		return true;
	if (!name.length && container)
		name = (struct text){container, strlen(container)};
	if (is(namespace, "default"))
		namespace.length = 0;
	snprintf(path, sizeof(path), "%.*s/%.*s/%.*s.yaml", (int)folder.length, folder.bytes,
		 (int)namespace.length, namespace.bytes, (int)name.length, name.bytes);
	return !stat(path, &found);
}

/* Whether guests are in the pod: a supervisor wrote its status down, and may be dead. */
static bool has_guests(void)
{
	const char *container = getenv("CNI_CONTAINERID");
	bool found = false;
	char named[1024];
	glob_t files;

	snprintf(named, sizeof(named), "{\"name\": \"%s\"", container ? container : "");
	if (glob(FOLDER "/*.pod/status.json", 0, NULL, &files))
		return false;
	for (size_t i = 0; i < files.gl_pathc && !found; i++) {
		FILE *file = fopen(files.gl_pathv[i], "r");
		char head[1024] = "";

		if (file) {
			found = fgets(head, sizeof(head), file) &&
				!strncmp(head, named, strlen(named));
			fclose(file);
		}
	}
	return found;
}

/* --- the daemon --- */

/* A connection to the daemon of this network namespace; -1 if there is none. */
static int connect_daemon(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct stat namespace;
	int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (fd < 0 || stat("/proc/self/ns/net", &namespace))
		return -1;
	snprintf(address.sun_path, sizeof(address.sun_path), FOLDER "/noded-%lu.sock",
		 (unsigned long)namespace.st_ino);
	return connect(fd, (void *)&address, sizeof(address)) ? -1 : fd;
}

static bool send_all(int fd, const char *bytes, size_t length)
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

static int ask_daemon(int fd)
{
	extern char **environ;
	struct text answer;

	for (char **variable = environ; *variable; variable++)
		if (!strncmp(*variable, "CNI_", 4) &&
		    !send_all(fd, *variable, strlen(*variable) + 1))
			return fail(IO, "the node daemon does not read", "");
	if (!send_all(fd, "", 1) || !send_all(fd, conf.text.bytes, conf.text.length) ||
	    shutdown(fd, SHUT_WR))
		return fail(IO, "the node daemon does not read", "");
	answer = read_all(fd);
	if (!answer.length)
		return fail(IO, "the node daemon failed", "; see its log");
	fwrite(answer.bytes + 1, 1, answer.length - 1, stdout);
	return answer.bytes[0] == '0' ? 0 : 1;
}

/* --- calls --- */

/* The versions. Whoever asks need not send a configuration. */
static int tell_versions(void)
{
	struct pollfd input = {.fd = STDIN_FILENO, .events = POLLIN};
	struct text v;

	if (poll(&input, 1, 100) > 0)
		parse(read_all(STDIN_FILENO));
	v = version();
	printf("{\"cniVersion\": \"%.*s\", \"supportedVersions\": [" VERSIONS "]}\n", (int)v.length,
	       v.bytes);
	return 0;
}

/* The result of the plugin before. */
static int pass_on(void)
{
	int previous = value_of(0, "prevResult");

	if (previous < 0 || conf.tokens[previous].type != JSMN_OBJECT)
		return fail(INVALID, "there is no prevResult",
			    "; chain testbed-cni after a main plugin");
	printf("%.*s\n", (int)text_of(previous).length, text_of(previous).bytes);
	return 0;
}

int main(void)
{
	const char *command = getenv("CNI_COMMAND");
	bool add, check, del;
	int daemon;

	if (!command)
		return fail(ENVIRONMENT, "CNI_COMMAND is not set", "; container runtimes set it");
	if (!strcmp(command, "VERSION"))
		return tell_versions();
	if (!parse(read_all(STDIN_FILENO)))
		return fail(DECODING, "the configuration is no JSON object", "");
	add = !strcmp(command, "ADD");
	check = !strcmp(command, "CHECK");
	del = !strcmp(command, "DEL");
	if ((add || check) && !gets_guests())
		return add ? pass_on() : 0;
	daemon = connect_daemon();
	if (daemon >= 0)
		return ask_daemon(daemon);
	if (del && !has_guests())
		return 0;
	if (!strcmp(command, "STATUS"))
		return fail(UNAVAILABLE, "the node daemon does not run", START);
	return fail(LATER, "the node daemon does not run, which guests need", START);
}
