//! Shell completions and manual pages, written when the program is installed.

use std::fs;
use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::args::Cli;
use crate::error::Result;
use crate::output;

/// Prints the completions for a shell.
pub fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible(), "backupctl", &mut script);
    Ok(output::print(&String::from_utf8_lossy(&script))?)
}

/// Writes a page for the program and one for each of its subcommands.
pub fn pages(dir: &Path) -> Result<()> {
    for (name, page) in all_pages()? {
        fs::write(dir.join(name), page)?;
    }
    Ok(())
}

/// The commands that are meant for users. clap can't take one away again, so this builds them up anew.
fn visible() -> clap::Command {
    let full = Cli::command();
    let mut command = clap::Command::new("backupctl").disable_help_subcommand(true);
    for argument in full.get_arguments() {
        command = command.arg(argument.clone());
    }
    for subcommand in full
        .get_subcommands()
        .filter(|subcommand| !subcommand.is_hide_set())
    {
        command = command.subcommand(subcommand.clone());
    }
    if let Some(about) = full.get_about() {
        command = command.about(about.clone());
    }
    command.version(env!("CARGO_PKG_VERSION"))
}

fn all_pages() -> io::Result<Vec<(String, Vec<u8>)>> {
    let mut command = visible();
    command.build();
    let mut pages = Vec::new();
    add_pages(&command, "backupctl", &mut pages)?;
    Ok(pages)
}

/// The page of a command, and those of the commands below it.
fn add_pages(command: &clap::Command, name: &str, pages: &mut Vec<(String, Vec<u8>)>) -> io::Result<()> {
    pages.push((format!("{name}.1"), page(command, name)?));
    for subcommand in command
        .get_subcommands()
        .filter(|command| command.get_name() != "help")
    {
        add_pages(subcommand, &format!("{name}-{}", subcommand.get_name()), pages)?;
    }
    Ok(())
}

fn page(command: &clap::Command, name: &str) -> io::Result<Vec<u8>> {
    let man = Man::new(command.clone().display_name(name.to_owned()));
    // clap_mangen leaves an empty date out, and what follows moves to its place. There is no date: a page is the
    // same whenever it is made.
    let source = concat!("backupd ", env!("CARGO_PKG_VERSION"));
    let title = roff(&name.to_uppercase());
    let mut page = format!(".TH {title} 1 \"\" \"{source}\" \"User Commands\"\n").into_bytes();
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    if command.has_subcommands() {
        man.render_subcommands_section(&mut page)?;
    }
    page.extend(EXIT_STATUS.as_bytes());
    page.extend(b".SH EXAMPLES\n");
    for (what, line) in examples(name.trim_start_matches("backupctl-")) {
        page.extend(format!("{what}:\n.PP\n.nf\n.RS\n{}\n.RE\n.fi\n.PP\n", quoted(line)).as_bytes());
    }
    page.extend(b".SH \"SEE ALSO\"\n");
    page.extend(match command.has_subcommands() {
        true => &b".BR busctl (1),\n.BR qemu-img (1)\n"[..],
        false => &b".BR backupctl (1)\n"[..],
    });
    Ok(page)
}

/// A text as it is: backslashes and hyphens mean something else to roff.
fn roff(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

/// A line as it is: so does a dot at its start.
fn quoted(line: &str) -> String {
    format!("\\&{}", roff(line))
}

const EXIT_STATUS: &str = r#".SH "EXIT STATUS"
.TP
.B 0
The backup completed; for a command that waits for no backup, what was asked was done.
.TP
.B 1
The backup failed, or it goes on and nobody waits for its result, or something else went wrong.
.TP
.B 2
The command line is wrong.
.TP
.B 3
The backup was cancelled.
.TP
.B 4
You are not authorised, or authentication was needed and could not be asked for.
.TP
.B 5
A stored backup is damaged.
"#;

fn examples(command: &str) -> &'static [(&'static str, &'static str)] {
    match command {
        "domains" => &[
            ("List the virtual machines", "backupctl domains"),
            ("List their disks, too", "backupctl domains --disks"),
        ],
        "create" => &[
            (
                "All disks of a virtual machine into the default store",
                "backupctl create web",
            ),
            (
                "Compressed, not faster than 50 MiB/s, into a store of the configuration",
                "backupctl create web --store nightly --compress zstd --bandwidth 50M",
            ),
            (
                "With the guest's file systems flushed and frozen for the instant",
                "backupctl create web --quiesce require",
            ),
            (
                "One disk into a file of your own",
                "backupctl create web --disk vda=vda.qcow2 --own-files",
            ),
            (
                "Raw images of all disks into a directory",
                "backupctl create web --to /backup/web --format raw",
            ),
            (
                "With a document of your own",
                "backupctl create web --definition backup.xml",
            ),
            (
                "For a script: start it, and wait for it later",
                "id=$(backupctl create web --detach --json | jq .id); backupctl watch $id",
            ),
        ],
        "jobs" => &[
            ("List the backups", "backupctl jobs"),
            ("List all that there is a record of", "backupctl jobs --all"),
        ],
        "backups" => &[
            ("List all backups", "backupctl backups"),
            (
                "Those of one VM in one store",
                "backupctl backups web --store nightly",
            ),
            (
                "Those in a store from another host",
                "backupctl backups --from /mnt/usb/backups",
            ),
        ],
        "delete" => &[
            (
                "Delete a backup without dependents",
                "backupctl delete 20261123T055937Z",
            ),
            (
                "See what would go with it",
                "backupctl delete --with-dependents --dry-run 20261123T055937Z-10ebf9b0",
            ),
        ],
        "protect" => &[(
            "Keep a backup whatever the rules say",
            "backupctl protect 20261123T055937Z-10ebf9b0",
        )],
        "unprotect" => &[("Let it go again", "backupctl unprotect 20261123T055937Z-10ebf9b0")],
        "prune" => &[
            (
                "Show which backups of a VM would be kept",
                "backupctl prune web --keep-daily 7 --keep-weekly 4 --dry-run",
            ),
            (
                "By the rules of a store in the configuration",
                "backupctl prune --store nightly",
            ),
        ],
        "checkpoints" => &[("List the checkpoints of a VM", "backupctl checkpoints web")],
        "checkpoint" | "checkpoint-create" => &[
            (
                "Record what is written from now on",
                "backupctl checkpoint create web --name before-upgrade",
            ),
            (
                "The same with a backup, which a later one can go on from",
                "backupctl create web --checkpoint before-upgrade",
            ),
        ],
        "checkpoint-delete" => &[(
            "Stop recording, and keep the backup",
            "backupctl checkpoint delete web before-upgrade",
        )],
        "checkpoint-dump" => &[("See what it is", "backupctl checkpoint dump web before-upgrade")],
        "rescan" => &[
            ("Find the backups in the stores", "backupctl rescan"),
            (
                "Take over a store whose host is gone, with its keep rules",
                "backupctl rescan --adopt",
            ),
        ],
        "show" => &[("Show job 7", "backupctl show 7")],
        "watch" => &[
            ("Wait for job 7", "backupctl watch 7"),
            ("Watch everything as JSON", "backupctl watch --json"),
        ],
        "cancel" => &[("Cancel job 7", "backupctl cancel 7")],
        "speed" => &[
            ("Slow job 7 down", "backupctl speed 7 20M"),
            ("Take its limit away", "backupctl speed 7 0"),
        ],
        "dump" => &[(
            "Make a document of your own out of one with all defaults",
            "backupctl dump 7 > backup.xml",
        )],
        "restore" => &[
            (
                "All disks of a backup, on a host that has only the store",
                "backupctl restore 20261123T0559 --from /mnt/backups --to /var/lib/machines",
            ),
            (
                "One disk onto a block device",
                "backupctl restore 20261123T055937Z --from /mnt/backups --disk vda=/dev/vg0/web",
            ),
        ],
        "verify" => &[
            (
                "One backup, and its bases",
                "backupctl verify 20261123T0559 --from /mnt/backups",
            ),
            ("All of a store", "backupctl verify --all --from /mnt/backups"),
        ],
        "export" => &[(
            "Look into a disk as it was; nbdcopy, guestfish and qemu-img take the URI that is printed",
            "backupctl export 20261123T0559 --from /mnt/backups --disk vda --socket /run/user/1000/vda.nbd",
        )],
        _ => &[
            ("List the virtual machines", "backupctl domains"),
            ("Back one up and wait for it", "backupctl create web"),
            ("See what is running", "backupctl jobs"),
        ],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_command_has_a_page_with_its_examples() {
        let pages = all_pages().unwrap();
        let names: Vec<&str> = pages.iter().map(|(name, _)| name.as_str()).collect();
        assert!(names.contains(&"backupctl.1") && names.contains(&"backupctl-create.1"));
        assert!(names.contains(&"backupctl-checkpoint-delete.1"));
        assert!(!names.contains(&"backupctl-man.1"));
        for (name, page) in &pages {
            let page = String::from_utf8_lossy(page);
            for section in ["NAME", "SYNOPSIS", "EXIT STATUS", "EXAMPLES"] {
                assert!(page.contains(section), "{name}: {section}");
            }
        }
    }

    #[test]
    fn each_example_is_a_command_line_that_parses() {
        for command in [
            "",
            "domains",
            "create",
            "jobs",
            "show",
            "watch",
            "cancel",
            "speed",
            "dump",
            "rescan",
            "backups",
            "delete",
            "prune",
            "restore",
            "verify",
            "export",
            "checkpoints",
            "checkpoint",
            "checkpoint-create",
            "checkpoint-delete",
            "checkpoint-dump",
        ] {
            for (_, line) in examples(command) {
                let line = line
                    .split(['>', '|', ';'])
                    .next()
                    .unwrap()
                    .trim_start_matches("id=$(");
                let words = line.split_whitespace().map(Into::into);
                assert!(Cli::parse_checked(words).is_ok(), "{line}");
            }
        }
    }

    #[test]
    fn completions_offer_what_users_need() {
        let mut script = Vec::new();
        clap_complete::generate(Shell::Bash, &mut visible(), "backupctl", &mut script);
        let script = String::from_utf8(script).unwrap();
        assert!(script.contains("own-files"));
        assert!(!script.contains("completions"));
    }
}
