//! Bounds how many descriptors of each user's processes the service inspects, so that no user can make a check slow.

use std::collections::HashMap;
use std::io;

use rustix::io::Errno;

/// The budget of one user. Descriptors beyond it are not seen, so only that user's own images lose the protection of
/// their locks.
const MOST_OF_USER: usize = 64 << 10;
/// The common budget of all users with numbers beyond the usual range of accounts, such as those of containers whose
/// ranges are unknown.
const MOST_OF_HIGH: usize = 256 << 10;
const FIRST_HIGH: u32 = 1 << 16;
/// Subordinate numbers, which belong to another user (subuid(5)).
const SUBORDINATES: &str = "/etc/subuid";

/// The user whose budget a process uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Payer {
    /// Has no limit.
    Root,
    User(u32),
    /// A user whose number is beyond those of accounts and in no known range.
    High(u32),
    /// All subordinate numbers of one user, by the index of that user's first line.
    Subordinates(usize),
}

struct Range {
    first: u32,
    count: u32,
}

/// The remaining budgets.
pub struct Budget {
    ranges: Vec<(Range, Payer)>,
    left: HashMap<Payer, usize>,
    left_of_high: usize,
}

impl Budget {
    /// Reads the subordinate numbers. Blocks.
    pub fn new() -> Self {
        Self::of(&std::fs::read_to_string(SUBORDINATES).unwrap_or_default())
    }

    /// A line is `USER:FIRST:COUNT`. A user can have several lines.
    fn of(subordinates: &str) -> Self {
        let mut users = HashMap::new();
        let ranges = subordinates.lines().enumerate().filter_map(|(number, line)| {
            let mut parts = line.trim().splitn(3, ':');
            let user = parts.next()?;
            let range = Range {
                first: parts.next()?.parse().ok()?,
                count: parts.next()?.parse().ok()?,
            };
            Some((range, Payer::Subordinates(*users.entry(user).or_insert(number))))
        });
        Self {
            ranges: ranges.collect(),
            left: HashMap::new(),
            left_of_high: MOST_OF_HIGH,
        }
    }

    /// Returns the user who started a process, or `None` if the process has ended. Blocks.
    ///
    /// This is the real user ID, because a set-user-ID program inherits its descriptors from the user who started it.
    pub fn payer_of(&self, process: u32) -> io::Result<Option<Payer>> {
        // The name of a process is any bytes: the kernel cuts it in the middle of a character.
        let status = match std::fs::read(format!("/proc/{process}/status")) {
            Ok(status) => status,
            Err(error) if has_ended(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let uid = real_user(&String::from_utf8_lossy(&status));
        let uid = uid.ok_or_else(|| io::Error::other(format!("/proc/{process}/status has no user")))?;
        Ok(Some(self.payer(uid)))
    }

    fn payer(&self, uid: u32) -> Payer {
        if uid == 0 {
            return Payer::Root;
        }
        let mut ranges = self.ranges.iter();
        let range = ranges.find(|(range, _)| uid.checked_sub(range.first).is_some_and(|n| n < range.count));
        match range {
            Some((_, payer)) => *payer,
            None if uid >= FIRST_HIGH => Payer::High(uid),
            None => Payer::User(uid),
        }
    }

    /// Takes one descriptor from the budget. Returns false if the budget is spent.
    pub fn take(&mut self, payer: Payer) -> bool {
        if payer == Payer::Root {
            return true;
        }
        let left = self.left.entry(payer).or_insert(MOST_OF_USER);
        let is_high = matches!(payer, Payer::High(_));
        if *left == 0 || (is_high && self.left_of_high == 0) {
            return false;
        }
        *left -= 1;
        self.left_of_high -= usize::from(is_high);
        true
    }
}

/// Whether an error of a file in `/proc/PID` means that the process has ended, or has closed the descriptor.
pub fn has_ended(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::NOENT | Errno::SRCH))
}

/// Parses the first number of `Uid:` in `/proc/PID/status` (proc_pid_status(5)). The kernel escapes newlines in the
/// name before it.
fn real_user(status: &str) -> Option<u32> {
    let ids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
    ids.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(budget: &mut Budget, users: impl IntoIterator<Item = u32>, each: usize) -> usize {
        let mut taken = 0;
        for uid in users {
            let payer = budget.payer(uid);
            taken += (0..each).filter(|_| budget.take(payer)).count();
        }
        taken
    }

    #[test]
    fn subordinate_numbers_share_the_budget_of_their_user() {
        let mut budget = Budget::of("anna:100000:65536\nbob:165536:65536\nanna:300000:10\nnonsense\n");
        assert_eq!(taken(&mut budget, 100_000..165_536, 32), MOST_OF_USER);
        assert_eq!(
            taken(&mut budget, [300_009], 1),
            0,
            "the second range is anna's too"
        );
        assert_eq!(taken(&mut budget, [165_536, 1000, 64_055, 0], 1), 4);
    }

    #[test]
    fn a_set_user_id_program_uses_the_budget_of_the_user_who_started_it() {
        let status = "Name:\tUid:\\nUid:\nUmask:\t0022\nPid:\t7\nUid:\t1000\t0\t0\t0\nGid:\t5\t5\t5\t5\n";
        assert_eq!(real_user(status), Some(1000));
        assert_eq!(real_user("Name:\ta\n"), None);
        let budget = Budget::of("");
        let own = budget.payer(rustix::process::getuid().as_raw());
        assert_eq!(budget.payer_of(std::process::id()).unwrap(), Some(own));
    }

    #[test]
    fn a_process_whose_name_is_cut_within_a_character_has_its_user() {
        let directory = tempfile::tempdir().unwrap();
        let program = directory.path().join("b\u{fc}ro-rechner-\u{fc}bung");
        // A link, because a copy could still be open for writing in a child that another test forks (ETXTBSY).
        std::os::unix::fs::symlink("/bin/sleep", &program).unwrap();
        let mut child = std::process::Command::new(&program).arg("60").spawn().unwrap();
        let budget = Budget::of("");
        let found = budget.payer_of(child.id()).unwrap();
        let name = std::fs::read(format!("/proc/{}/comm", child.id())).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(String::from_utf8(name).is_err(), "the name is cut");
        assert_eq!(found, Some(budget.payer(rustix::process::getuid().as_raw())));
        assert_eq!(budget.payer_of(child.id()).unwrap(), None, "it has ended");
    }

    #[test]
    fn unknown_high_numbers_share_a_budget_and_take_none_from_accounts() {
        let mut budget = Budget::of("");
        assert_eq!(taken(&mut budget, 100_000..165_536, 32), MOST_OF_HIGH);
        assert_eq!(taken(&mut budget, [200_000], 1), 0);
        assert_eq!(taken(&mut budget, [1000], 2 * MOST_OF_USER), MOST_OF_USER);
        assert_eq!(taken(&mut budget, [0], 2 * MOST_OF_USER), 2 * MOST_OF_USER);
    }
}
