// SPDX-License-Identifier: Apache-2.0
/*
 * Tells on the console with which status the program ends, as OSv does not, and writes out what
 * stdio holds back. Not covered: functions of OSv's libc that end the program themselves (err,
 * errx), and threads that outlive it.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "kernel.h"

typedef int Main(int argc, char **argv, char **env);

int __libc_start_main(Main *main, int argc, char **argv, void (*init)(void), void (*fini)(void),
		      void (*rtld_fini)(void), void *stack);

static Main *program;

static void tell(int status)
{
	static atomic_flag told = ATOMIC_FLAG_INIT;
	int console;

	if (atomic_flag_test_and_set(&told))
		return;
	console = open("/dev/console", O_WRONLY);
	dprintf(console, "\nguest ends: status %d\n", status & 0xff);
	close(console);
}

static void flush_and_tell(int status)
{
	fflush(NULL); /* OSv powers off without it */
	tell(status);
}

static int run(int argc, char **argv, char **env)
{
	int status = program(argc, argv, env);

	flush_and_tell(status);
	return status;
}

int __libc_start_main(Main *main, int argc, char **argv, void (*init)(void), void (*fini)(void),
		      void (*rtld_fini)(void), void *stack)
{
	program = main;
	return KERNEL(__libc_start_main)(run, argc, argv, init, fini, rtld_fini, stack);
}

void exit(int status)
{
	flush_and_tell(status);
	KERNEL(exit)(status);
	__builtin_unreachable();
}

void _exit(int status)
{
	tell(status);
	KERNEL(_exit)(status);
	__builtin_unreachable();
}

void _Exit(int status)
{
	_exit(status);
}
