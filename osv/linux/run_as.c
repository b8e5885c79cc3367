// SPDX-License-Identifier: Apache-2.0
/*
 * Runs a program in a Linux guest as the user and in the folder that its image or manifest says.
 * The user owns its output, as in a container.
 *
 * usage: run_as UID GID[,GROUP...] FOLDER COMMAND [ARGUMENT...]
 */
#define _GNU_SOURCE
#include <err.h>
#include <errno.h>
#include <grp.h>
#include <stdlib.h>
#include <unistd.h>

enum { MAX_GROUPS = 64, CANNOT_RUN = 126, NOT_FOUND = 127 }; /* as a shell says it */

int main(int argc, char **argv)
{
	gid_t groups[MAX_GROUPS];
	size_t n = 0;
	uid_t user;

	program_invocation_short_name = "guest"; /* err(3) begins with it */
	if (argc < 5)
		errx(CANNOT_RUN, "usage: run_as UID GID[,GROUP...] FOLDER COMMAND [ARGUMENT...]");
	user = strtoul(argv[1], NULL, 10);
	for (char *next = argv[2];; next++) {
		if (n == MAX_GROUPS)
			errx(CANNOT_RUN, "more than %d groups", MAX_GROUPS);
		groups[n++] = strtoul(next, &next, 10);
		if (*next != ',')
			break;
	}
	if (chdir(argv[3]))
		err(CANNOT_RUN, "%s", argv[3]);
	if (fchown(STDOUT_FILENO, user, groups[0]) || setgroups(n, groups) || setgid(groups[0]) ||
	    setuid(user))
		err(CANNOT_RUN, "user %s", argv[1]);
	execvp(argv[4], argv + 4);
	err(errno == ENOENT ? NOT_FOUND : CANNOT_RUN, "cannot run %s", argv[4]);
}
