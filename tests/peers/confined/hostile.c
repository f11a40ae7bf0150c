/* Simulates a program that reads images and was taken over through a fault of its parser. It tries to reach other
 * resources, and prints each one that it reached on standard error. It is compiled with the names of existing
 * resources. */

#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/openat2.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/xattr.h>
#include <unistd.h>

extern char **environ;

static int tried;

static void attempt(const char *what, int reached)
{
    tried++;
    if (reached)
        fprintf(stderr, "reached %s\n", what);
}

static int opens(const char *path, int flags)
{
    int file = open(path, flags, 0600);
    if (file >= 0)
        close(file);
    return file >= 0;
}

/* A file of the process of the service, or of another parent. */
static const char *of_parent(const char *name)
{
    static char path[64];
    snprintf(path, sizeof path, "/proc/%d/%s", getppid(), name);
    return path;
}

static int connects(int type, struct sockaddr *address, socklen_t length)
{
    int s = socket(address->sa_family, type, 0);
    return s >= 0 && connect(s, address, length) == 0;
}

static int connects_to_name(const char *name, size_t length)
{
    struct sockaddr_un address = { .sun_family = AF_UNIX };
    memcpy(address.sun_path, name, length);
    return connects(SOCK_STREAM, (struct sockaddr *)&address, offsetof(struct sockaddr_un, sun_path) + length);
}

static int connects_to_port(int type)
{
    struct sockaddr_in address = { .sin_family = AF_INET, .sin_port = htons(PORT) };
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return connects(type, (struct sockaddr *)&address, sizeof address);
}

/* Lists the open descriptors except the standard ones; returns the first. */
static int files(int *first)
{
    int count = 0;
    for (int number = 3; number < 4096; number++)
        if (fcntl(number, F_GETFD) >= 0 && ++count == 1)
            *first = number;
    return count;
}

static int sets_flags(int file)
{
    int flags = 0;
    ioctl(file, FS_IOC_GETFLAGS, &flags);
    flags |= FS_NODUMP_FL;
    return ioctl(file, FS_IOC_SETFLAGS, &flags) == 0;
}

static int has_process(void)
{
    pid_t child = fork();
    if (child == 0)
        _exit(0);
    return child > 0;
}

static int unlimits(void)
{
    struct rlimit limit = { RLIM_INFINITY, RLIM_INFINITY };
    return setrlimit(RLIMIT_DATA, &limit) == 0;
}

static int fills_memory(void)
{
    return malloc((size_t)3 << 30) != NULL;
}

int main(int argc, char **argv)
{
    int image = -1;
    char name[32], parameters[512] = { 0 }, link_to_image[64] = "";

    attempt("a file that was left open", files(&image) > PASSED);
    attempt("its parent's environment", environ[0] != NULL);
    attempt("root's files", opens("/etc/shadow", O_RDONLY));
    attempt("another file of the store's", opens(VICTIM, O_RDONLY));
    attempt("another file by a newer call",
            syscall(SYS_openat2, AT_FDCWD, VICTIM, &(struct open_how){ .flags = O_RDONLY }, sizeof(struct open_how)) >= 0);
    attempt("writing to another file", opens(VICTIM, O_WRONLY));
    attempt("a directory's names", opendir("/var/lib") != NULL);
#if !WRITES
    snprintf(name, sizeof name, "/dev/fd/%d", image);
    attempt("writing to its image", opens(name, O_RDWR));
#endif
    attempt("its image's mode", fchmod(image, 0666) == 0);
    attempt("its image's flags", sets_flags(image));
    attempt("signals by its image", fcntl(image, F_SETOWN, getppid()) == 0);
    attempt("a device", opens("/dev/zero", O_RDWR));
    attempt("a block device", opens(DEVICE, O_RDONLY));
    attempt("a file in /tmp", opens(NEW, O_CREAT | O_RDWR));
    attempt("a directory in /tmp", mkdir(NEW "-directory", 0700) == 0);
    attempt("a link", symlink("/etc/shadow", NEW "-link") == 0);
    attempt("another name", link(VICTIM, NEW "-name") == 0);
    attempt("a device's name", mknod(NEW "-device", S_IFBLK | 0666, 0x0700) == 0);
    attempt("a socket", mknod(NEW "-socket", S_IFSOCK | 0666, 0) == 0);
    attempt("a file's mode", chmod(VICTIM, 0666) == 0);
    attempt("a file's owner", chown(VICTIM, 0, 0) == 0);
    attempt("a file's attributes", setxattr(VICTIM, "trusted.x", "x", 1, 0) == 0);
    attempt("a file's times", utimensat(AT_FDCWD, VICTIM, NULL, 0) == 0);
    attempt("a file's length", truncate(VICTIM, 0) == 0);
    attempt("a file's end", unlink(VICTIM) == 0);
    attempt("the system bus", connects_to_name(BUS, sizeof BUS));
    attempt("an abstract socket", connects_to_name("\0" ABSTRACT, sizeof ABSTRACT));
    attempt("TCP", connects_to_port(SOCK_STREAM));
    attempt("UDP", connects_to_port(SOCK_DGRAM));
    attempt("the service's memory", opens(of_parent("mem"), O_RDONLY));
    attempt("the service's environment", opens(of_parent("environ"), O_RDONLY));
    attempt("the service's files", readlink(of_parent("fd/0"), link_to_image, sizeof link_to_image) > 0);
    attempt("a signal to the service", kill(getppid(), 0) == 0);
    attempt("a thread of the service's", syscall(SYS_tgkill, getppid(), getppid(), 0) == 0);
    attempt("a handle of the service", syscall(SYS_pidfd_open, getppid(), 0) >= 0);
    attempt("tracing the service", ptrace(PTRACE_SEIZE, getppid(), 0, 0) == 0);
    attempt("the service's limits", prlimit(getppid(), RLIMIT_NOFILE, NULL, &(struct rlimit){ 0, 0 }) == 0);
    attempt("a process", has_process());
    attempt("memory that others can get", syscall(SYS_memfd_create, "x", 0) >= 0);
    attempt("a key", syscall(SYS_add_key, "user", "x", "x", 1, -2) >= 0);
    attempt("io_uring", syscall(SYS_io_uring_setup, 1, parameters) >= 0);
    attempt("outliving the service", prctl(PR_SET_PDEATHSIG, 0) == 0);
    attempt("its own limits", unlimits());
    attempt("all memory", fills_memory());
    attempt("coming last when memory is short", opens("/proc/self/oom_score_adj", O_WRONLY));
    attempt("a user namespace", unshare(CLONE_NEWUSER) == 0);
    fprintf(stderr, "tried %d\n", tried + 1);
    execl("/bin/echo", "echo", "reached another program", (char *)NULL);
    return 1;
}
