//! The system calls that a program needs to read images. All others are refused.
//!
//! Complements Landlock, which cannot refuse these: changing modes and owners of root's files, creating sockets,
//! sending signals, accessing other processes. An older kernel's Landlock also does not prevent connections to UNIX
//! sockets. Other calls fail with ENOSYS, so that the C library falls back to older ones.

use std::collections::BTreeMap;

use nix::libc;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use super::Error;

/// Calls that are allowed with any arguments.
const CALLS: &[libc::c_long] = &[
    // Open files.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_flock,
    libc::SYS_fstat,
    libc::SYS_fstatfs,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fadvise64,
    libc::SYS_readahead,
    libc::SYS_copy_file_range,
    libc::SYS_getdents64,
    // Paths, as far as Landlock lets them be opened.
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_newfstatat,
    libc::SYS_statfs,
    libc::SYS_statx,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    // Threads and time.
    libc::SYS_futex,
    libc::SYS_get_robust_list,
    libc::SYS_set_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_getparam,
    libc::SYS_sched_getscheduler,
    libc::SYS_getcpu,
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_times,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_timerfd_settime,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    // The process's own signals.
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sigaltstack,
    libc::SYS_signalfd4,
    // Waiting.
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_eventfd2,
    libc::SYS_pipe2,
    // Inherited sockets. The program can neither create, connect nor bind one.
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_listen,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    // Identity of the process, and system information.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_gettid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getresuid,
    libc::SYS_getresgid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    // The program itself. Landlock lets it execute no other.
    libc::SYS_execve,
];

/// Commands of fcntl(2): duplication, flags and locks. Excluded are commands that send signals (`F_SETOWN`) or change
/// the file.
const FILE_COMMANDS: &[libc::c_int] = &[
    libc::F_DUPFD,
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_GETLK,
    libc::F_SETLK,
    libc::F_SETLKW,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_OFD_SETLKW,
];

/// Commands of ioctl(2): queries of files and devices (linux/fs.h, linux/blkzoned.h, scsi/sg.h, XFS), and discarding
/// zeroes. The program can neither change a file's flags or keys, detach loop devices, nor send commands to a disk.
const DEVICE_COMMANDS: &[u32] = &[
    0x125e,      // BLKROGET
    0x1260,      // BLKGETSIZE
    0x1267,      // BLKSECTGET
    0x1268,      // BLKSSZGET
    0x1277,      // BLKDISCARD
    0x1278,      // BLKIOMIN
    0x1279,      // BLKIOOPT
    0x127a,      // BLKALIGNOFF
    0x127b,      // BLKPBSZGET
    0x127c,      // BLKDISCARDZEROES
    0x127e,      // BLKROTATIONAL
    0x127f,      // BLKZEROOUT
    0x8008_1272, // BLKGETSIZE64
    0xc010_1282, // BLKREPORTZONE
    0x8004_1284, // BLKGETZONESZ
    0x8004_1285, // BLKGETNRZONES
    0x2282,      // SG_GET_VERSION_NUM
    0x5331,      // CDROM_GET_CAPABILITY
    0x800c_581e, // XFS_IOC_DIOINFO
    0xc020_660b, // FS_IOC_FIEMAP
    0x5401,      // TCGETS
    0x541b,      // FIONREAD
    0x5421,      // FIONBIO
];

/// Older forms of some calls, which the C library uses on this architecture.
#[cfg(target_arch = "x86_64")]
const OLDER_CALLS: &[libc::c_long] = &[
    libc::SYS_access,
    libc::SYS_arch_prctl,
    libc::SYS_dup2,
    libc::SYS_epoll_wait,
    libc::SYS_getrlimit,
    libc::SYS_lstat,
    libc::SYS_pipe,
    libc::SYS_poll,
    libc::SYS_readlink,
    libc::SYS_select,
    libc::SYS_stat,
    libc::SYS_time,
];
#[cfg(not(target_arch = "x86_64"))]
const OLDER_CALLS: &[libc::c_long] = &[];

/// Restricts this process, and the program that it executes, to these calls. If `writes` is false, it can open files
/// for reading only.
pub fn restrict(writes: bool) -> Result<(), Error> {
    let filter = filter(writes).map_err(seccompiler::Error::Backend)?;
    Ok(seccompiler::apply_filter(&filter)?)
}

fn filter(writes: bool) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in CALLS.iter().chain(OLDER_CALLS) {
        rules.insert(*call, Vec::new());
    }
    // Prevents creation and truncation of files. The files that it writes to already have their size.
    let mut changing = libc::O_CREAT | (libc::O_TMPFILE & !libc::O_DIRECTORY) | libc::O_TRUNC;
    if !writes {
        changing |= libc::O_ACCMODE;
    }
    rules.insert(libc::SYS_openat, vec![flags(2, changing, 0)?]);
    #[cfg(target_arch = "x86_64")]
    rules.insert(libc::SYS_open, vec![flags(1, changing, 0)?]);
    // Allows threads but no processes.
    rules.insert(
        libc::SYS_clone,
        vec![flags(0, libc::CLONE_THREAD, libc::CLONE_THREAD)?],
    );
    // The process's own limits and threads; abort(3) signals its own thread.
    rules.insert(libc::SYS_prlimit64, vec![is(0, 0)?]);
    let own = u64::from(std::process::id());
    rules.insert(libc::SYS_tgkill, vec![is(0, own)?]);
    let names = [libc::PR_SET_NAME, libc::PR_GET_NAME, libc::PR_SET_TIMERSLACK];
    rules.insert(
        libc::SYS_prctl,
        one_of(0, names.map(i32::unsigned_abs).into_iter())?,
    );
    rules.insert(
        libc::SYS_fcntl,
        one_of(1, FILE_COMMANDS.iter().map(|it| it.unsigned_abs()))?,
    );
    rules.insert(libc::SYS_ioctl, one_of(1, DEVICE_COMMANDS.iter().copied())?);
    let refused = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let architecture = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, refused, SeccompAction::Allow, architecture)?.try_into()
}

/// Matches an argument whose bits in `mask` equal `value`.
fn flags(argument: u8, mask: libc::c_int, value: libc::c_int) -> Result<SeccompRule, BackendError> {
    let operator = SeccompCmpOp::MaskedEq(u64::from(mask.unsigned_abs()));
    rule(argument, operator, u64::from(value.unsigned_abs()))
}

fn one_of(argument: u8, values: impl Iterator<Item = u32>) -> Result<Vec<SeccompRule>, BackendError> {
    values.map(|value| is(argument, value.into())).collect()
}

fn is(argument: u8, value: u64) -> Result<SeccompRule, BackendError> {
    rule(argument, SeccompCmpOp::Eq, value)
}

/// Compares 32 bits, because the kernel ignores the upper half of an `int` argument.
fn rule(argument: u8, operator: SeccompCmpOp, value: u64) -> Result<SeccompRule, BackendError> {
    let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?;
    SeccompRule::new(vec![condition])
}
