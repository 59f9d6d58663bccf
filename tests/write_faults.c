/* Preloaded into a process under test: the n-th change of a file below a folder fails with an error of choice.
   Counted are opens for writing, writes, flushes, truncations, renames, new folders and removals, whoever makes them:
   Python, torch's archive writer, safetensors. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define MOST_FILES 65536
static char below[4096];
static long armed = -1, seen = 0;
static int error_number = 0, to_the_end = 0;
static char named[MOST_FILES]; /* 1: a file or folder below; 2: opened for writing; 3: to be changed in place */
static char last[8192] = "";

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

void faults_arm(const char *folder, long at, int number, int sticky) {
    snprintf(below, sizeof below, "%s", folder);
    armed = at; error_number = number; to_the_end = sticky; seen = 0;
}
long faults_seen(void) { return seen; }
const char *faults_last(void) { return last; }
static FILE *trace = NULL;
void faults_trace(const char *path) { trace = path ? ((__typeof__(&fopen))dlsym(RTLD_NEXT, "fopen"))(path, "w") : (trace ? (fclose(trace), NULL) : NULL); }

static const char *path_of(int fd) {
    static char path[4096], link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    path[n > 0 ? n : 0] = 0;
    return path;
}

static int is_below(int folder, const char *path) {
    if (!below[0] || !path) return 0;
    if (path[0] == '/') return strncmp(path, below, strlen(below)) == 0;
    if (folder != AT_FDCWD) return folder >= 0 && folder < MOST_FILES && named[folder];
    char here[4096], whole[8200];
    if (!getcwd(here, sizeof here)) return 0;
    snprintf(whole, sizeof whole, "%s/%s", here, path);
    return strncmp(whole, below, strlen(below)) == 0;
}

/* On a full disk files are still removed, renamed and flushed. */
static int takes_room(const char *what) { return !strcmp(what, "open") || !strcmp(what, "write") || !strcmp(what, "mkdir"); }

static int fails(const char *what, const char *path) {
    long now = seen++;
    if (trace) fprintf(trace, "%s %s\n", what, path);
    if (armed >= 0 && (now == armed || (to_the_end && now > armed && takes_room(what)))) {
        if (now == armed) snprintf(last, sizeof last, "%s %s", what, path);
        errno = error_number;
        return 1;
    }
    return 0;
}

static int note(int fd, int folder, const char *path, int writes) {
    if (fd >= 0 && fd < MOST_FILES) named[fd] = is_below(folder, path) ? writes + 1 : 0;
    return fd;
}
static int is_written(int fd) { if (to_the_end && fd >= 0 && fd < MOST_FILES && named[fd] == 3) return 0; return fd >= 0 && fd < MOST_FILES && named[fd] >= 2; }
static int writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY || (flags & O_CREAT); }

#define MODE(flags) mode_t mode = 0; if ((flags) & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }
#define OPEN(name) int name(const char *path, int flags, ...) { MODE(flags) \
    if (writes(flags) && is_below(AT_FDCWD, path) && fails(flags & (O_CREAT | O_TRUNC) ? "open" : "change", path)) return -1; \
    return note(REAL(name)(path, flags, mode), AT_FDCWD, path, !writes(flags) ? 0 : flags & (O_CREAT | O_TRUNC) ? 1 : 2); }
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { MODE(flags) \
    if (writes(flags) && is_below(folder, path) && fails("open", path)) return -1; \
    return note(REAL(name)(folder, path, flags, mode), folder, path, writes(flags)); }
OPEN(open) OPEN(open64) OPENAT(openat) OPENAT(openat64)

#define FOPEN(name) FILE *name(const char *path, const char *mode) { int writing = strpbrk(mode, "wa+") != NULL; \
    if (writing && is_below(AT_FDCWD, path) && fails("open", path)) return NULL; \
    FILE *file = REAL(name)(path, mode); if (file) note(fileno(file), AT_FDCWD, path, writing); return file; }
FOPEN(fopen) FOPEN(fopen64)

int close(int fd) { if (fd >= 0 && fd < MOST_FILES) named[fd] = 0; return REAL(close)(fd); }
ssize_t write(int fd, const void *b, size_t n) { if (is_written(fd) && fails("write", path_of(fd))) return -1; return REAL(write)(fd, b, n); }
ssize_t pwrite(int fd, const void *b, size_t n, off_t o) { if (is_written(fd) && fails("write", path_of(fd))) return -1; return REAL(pwrite)(fd, b, n, o); }
ssize_t pwrite64(int fd, const void *b, size_t n, off64_t o) { if (is_written(fd) && fails("write", path_of(fd))) return -1; return REAL(pwrite64)(fd, b, n, o); }
ssize_t writev(int fd, const struct iovec *v, int n) { if (is_written(fd) && fails("write", path_of(fd))) return -1; return REAL(writev)(fd, v, n); }
size_t fwrite(const void *b, size_t s, size_t n, FILE *f) { if (is_written(fileno(f)) && fails("write", path_of(fileno(f)))) return 0; return REAL(fwrite)(b, s, n, f); }
int ftruncate(int fd, off_t n) { if (is_written(fd) && fails("truncate", path_of(fd))) return -1; return REAL(ftruncate)(fd, n); }
int ftruncate64(int fd, off64_t n) { if (is_written(fd) && fails("truncate", path_of(fd))) return -1; return REAL(ftruncate64)(fd, n); }
int fsync(int fd) { if (fd >= 0 && fd < MOST_FILES && named[fd] && fails("fsync", path_of(fd))) return -1; return REAL(fsync)(fd); }
int fdatasync(int fd) { if (fd >= 0 && fd < MOST_FILES && named[fd] && fails("fsync", path_of(fd))) return -1; return REAL(fdatasync)(fd); }
int rename(const char *a, const char *b) { if (is_below(AT_FDCWD, b) && fails("rename", b)) return -1; return REAL(rename)(a, b); }
int renameat(int d, const char *a, int e, const char *b) { if (is_below(e, b) && fails("rename", b)) return -1; return REAL(renameat)(d, a, e, b); }
int mkdir(const char *p, mode_t m) { if (is_below(AT_FDCWD, p) && fails("mkdir", p)) return -1; return REAL(mkdir)(p, m); }
int mkdirat(int d, const char *p, mode_t m) { if (is_below(d, p) && fails("mkdir", p)) return -1; return REAL(mkdirat)(d, p, m); }
int unlink(const char *p) { if (is_below(AT_FDCWD, p) && fails("unlink", p)) return -1; return REAL(unlink)(p); }
int unlinkat(int d, const char *p, int f) { if (is_below(d, p) && fails("unlink", p)) return -1; return REAL(unlinkat)(d, p, f); }
int rmdir(const char *p) { if (is_below(AT_FDCWD, p) && fails("rmdir", p)) return -1; return REAL(rmdir)(p); }
