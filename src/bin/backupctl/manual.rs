//! Shell completions and manual pages, generated at installation.

use std::fs;
use std::io;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;
use clap_mangen::Man;

use crate::args::Cli;
use crate::error::Result;
use crate::{document_pages, output};

/// Prints the completions for a shell.
pub fn completions(shell: Shell) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut visible(), "backupctl", &mut script);
    Ok(output::print(&String::from_utf8_lossy(&script))?)
}

/// Writes a page for the program, one for each command, and one for each kind of document, each into the directory of
/// its section.
pub fn pages(dir: &Path) -> Result<()> {
    for (name, page) in all_pages()?.into_iter().chain(document_pages::pages()) {
        let section = name.rsplit('.').next().unwrap_or_default();
        let dir = dir.join(format!("man{section}"));
        fs::create_dir_all(&dir)?;
        fs::write(dir.join(name), page)?;
    }
    Ok(())
}

/// The commands for users. clap cannot remove a command, so this rebuilds the program without the hidden ones.
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

/// Adds the page of a command, and those of its subcommands.
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
    // clap_mangen would omit an empty date, and the other fields of `.TH` would move. The date is empty because a page
    // must not depend on the time of the build.
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

/// Escapes backslashes and hyphens for roff.
pub fn roff(text: &str) -> String {
    text.replace('\\', "\\e").replace('-', "\\-")
}

/// Escapes a line for roff, including a dot at its start.
pub fn quoted(line: &str) -> String {
    format!("\\&{}", roff(line))
}

const EXIT_STATUS: &str = r#".SH "EXIT STATUS"
.TP
.B 0
Success: the job completed. For a command that does not wait for a job, the service did what you asked.
.TP
.B 1
The job failed, the command stopped waiting for a running job, or another error occurred.
.TP
.B 2
Usage error on the command line.
.TP
.B 3
The job was cancelled.
.TP
.B 4
You are not authorised, or a password was needed and could not be asked for.
.TP
.B 5
A stored backup is damaged.
"#;

fn examples(command: &str) -> &'static [(&'static str, &'static str)] {
    match command {
        "domains" => &[
            ("List the virtual machines", "backupctl domains"),
            ("List them with their disks", "backupctl domains --disks"),
        ],
        "create" => &[
            (
                "Back up all disks of a VM into the default store",
                "backupctl create web",
            ),
            (
                "Back up into a configured store, compressed, with at most 50 MiB/s",
                "backupctl create web --store nightly --compress zstd --bandwidth 50M",
            ),
            (
                "Freeze the guest's file systems at the point in time",
                "backupctl create web --quiesce require",
            ),
            (
                "Copy one disk to a file that you own",
                "backupctl create web --disk vda=vda.qcow2 --own-files",
            ),
            (
                "Write raw images of all disks into a directory",
                "backupctl create web --to /backup/web --format raw",
            ),
            (
                "Send your own document",
                "backupctl create web --definition backup.xml",
            ),
            (
                "Start a backup in a script, and wait for it later",
                "id=$(backupctl create web --detach --json | jq .id); backupctl watch $id",
            ),
        ],
        "jobs" => &[
            ("List running and recent jobs", "backupctl jobs"),
            ("List all recorded jobs", "backupctl jobs --all"),
        ],
        "backups" => &[
            ("List all backups", "backupctl backups"),
            (
                "List the backups of one VM in one store",
                "backupctl backups web --store nightly",
            ),
            (
                "List the backups in a store from another host",
                "backupctl backups --from /mnt/usb/backups",
            ),
        ],
        "delete" => &[
            (
                "Delete a backup without dependents",
                "backupctl delete 20261123T055937Z",
            ),
            (
                "Print the backups that would be deleted with it",
                "backupctl delete --with-dependents --dry-run 20261123T055937Z-10ebf9b0",
            ),
        ],
        "protect" => &[(
            "Keep a backup regardless of the keep rules",
            "backupctl protect 20261123T055937Z-10ebf9b0",
        )],
        "unprotect" => &[(
            "End the protection",
            "backupctl unprotect 20261123T055937Z-10ebf9b0",
        )],
        "prune" => &[
            (
                "Print which backups of a VM would be kept",
                "backupctl prune web --keep-daily 7 --keep-weekly 4 --dry-run",
            ),
            (
                "Prune by the configured keep rules of a store",
                "backupctl prune --store nightly",
            ),
        ],
        "checkpoints" => &[("List the checkpoints of a VM", "backupctl checkpoints web")],
        "checkpoint" | "checkpoint-create" => &[
            (
                "Record the writes from now on",
                "backupctl checkpoint create web --name before-upgrade",
            ),
            (
                "Make a backup that a later one can use as base by this name",
                "backupctl create web --checkpoint before-upgrade",
            ),
        ],
        "checkpoint-delete" => &[(
            "Stop recording, and keep the backup",
            "backupctl checkpoint delete web before-upgrade",
        )],
        "checkpoint-dump" => &[(
            "Print the document of a checkpoint",
            "backupctl checkpoint dump web before-upgrade",
        )],
        "rescan" => &[
            ("Update the catalog from the stores", "backupctl rescan"),
            (
                "Adopt a store of another host, and apply keep rules to its backups",
                "backupctl rescan --adopt",
            ),
        ],
        "show" => &[("Show job 7", "backupctl show 7")],
        "watch" => &[
            ("Wait for job 7", "backupctl watch 7"),
            ("Watch all jobs as JSON", "backupctl watch --json"),
        ],
        "cancel" => &[("Cancel job 7", "backupctl cancel 7")],
        "speed" => &[
            ("Slow job 7 down", "backupctl speed 7 20M"),
            ("Remove its limit", "backupctl speed 7 0"),
        ],
        "dump" => &[(
            "Save the document of a job with all defaults, to edit it",
            "backupctl dump 7 > backup.xml",
        )],
        "restore" => &[
            (
                "Restore all disks on a host that has only the store",
                "backupctl restore 20261123T0559 --from /mnt/backups --to /var/lib/machines",
            ),
            (
                "Restore one disk onto a block device",
                "backupctl restore 20261123T055937Z --from /mnt/backups --disk vda=/dev/vg0/web",
            ),
        ],
        "verify" => &[
            (
                "Verify one backup and its bases",
                "backupctl verify 20261123T0559 --from /mnt/backups",
            ),
            (
                "Verify all backups of a store",
                "backupctl verify --all --from /mnt/backups",
            ),
        ],
        "export" => &[(
            "Serve a disk; pass the printed URI to nbdcopy, guestfish or qemu-img",
            "backupctl export 20261123T0559 --from /mnt/backups --disk vda --socket /run/user/1000/vda.nbd",
        )],
        _ => &[
            ("List the virtual machines", "backupctl domains"),
            ("Back up a VM, and wait for the end", "backupctl create web"),
            ("List running and recent jobs", "backupctl jobs"),
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
    fn completions_offer_visible_commands_only() {
        let mut script = Vec::new();
        clap_complete::generate(Shell::Bash, &mut visible(), "backupctl", &mut script);
        let script = String::from_utf8(script).unwrap();
        assert!(script.contains("own-files"));
        assert!(!script.contains("completions"));
    }
}
