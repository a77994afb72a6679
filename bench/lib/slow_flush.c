/*
 * bench/lib/slow_flush.c
 *		Each flush takes DELAY_US microseconds more, as on a disk that has no
 *		cache to confirm a write from.  For LD_PRELOAD into the server.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <time.h>

static int
flush_slowly(const char *name, int fd)
{
	struct timespec delay = {DELAY_US / 1000000, DELAY_US % 1000000 * 1000L};
	int			(*flush) (int) = (int (*) (int)) dlsym(RTLD_NEXT, name);

	nanosleep(&delay, NULL);
	return flush(fd);
}

int
fdatasync(int fd)
{
	return flush_slowly("fdatasync", fd);
}

int
fsync(int fd)
{
	return flush_slowly("fsync", fd);
}
