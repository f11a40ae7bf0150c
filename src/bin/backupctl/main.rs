//! backupctl: the command line of the backup service.
//!
//! `args` defines the command line. `create`, `watch`, `list`, `backups`, `delete`, `prune` and `checkpoints` hold the
//! commands. `follow` waits for a job, `view` and `bars` show its progress, and `summary` prints its outcome. `stored`
//! reads backups without the service. Only `proxy` knows the calls and signals of the service.

mod agent;
mod args;
mod backups;
mod bars;
mod checkpoints;
mod create;
mod delete;
mod document;
mod document_pages;
mod error;
mod files;
mod follow;
mod found;
mod instance;
mod interrupt;
mod job;
mod list;
mod manual;
mod output;
mod owner;
mod protect;
mod proxy;
mod prune;
mod stored;
mod summary;
mod units;
mod view;
mod watch;

use std::process::ExitCode;

use agent::Agent;
use args::{Cli, Command};
use error::{Error, Result, Status};
use proxy::Service;

fn main() -> ExitCode {
    if let Some(status) = backupd::image::become_tethered() {
        return status;
    }
    let arguments: Vec<_> = std::env::args_os().collect();
    let json = arguments.iter().any(|argument| argument == "--json");
    let cli = match Cli::parse_checked(arguments) {
        Ok(cli) => cli,
        // clap returns help and version as errors for standard output.
        Err(error) if json && error.use_stderr() => {
            let text = error.render().to_string();
            let text = text.trim().trim_start_matches("error: ");
            Error::Usage(text.to_owned()).report(true);
            return ExitCode::from(Status::Usage as u8);
        }
        Err(error) => error.exit(),
    };
    let result = match &cli.command {
        Command::Completions { shell } => manual::completions(*shell).map(|()| Status::Completed),
        Command::Man { dir } => manual::pages(dir).map(|()| Status::Completed),
        Command::Backups {
            domain,
            from: Some(path),
            ..
        } => backups::list_store(path, domain.as_deref(), cli.json),
        command => stored::run(command, cli.json).unwrap_or_else(|| run_on_bus(&cli)),
    };
    let status = result.unwrap_or_else(|error| {
        error.report(cli.json);
        error.status()
    });
    ExitCode::from(status as u8)
}

fn run_on_bus(cli: &Cli) -> Result<Status> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Setup)?;
    runtime.block_on(run(cli))
}

async fn run(cli: &Cli) -> Result<Status> {
    let json = cli.json;
    let ask_password = !cli.no_ask_password;
    let service = Service::connect(ask_password).await?;
    // Lives as long as the call. `create` and `watch` have their own, because they use the terminal afterwards.
    let _agent = match cli.command {
        Command::Show { .. }
        | Command::Cancel { .. }
        | Command::Speed { .. }
        | Command::Dump { .. }
        | Command::Delete { .. }
        | Command::Protect { .. }
        | Command::Unprotect { .. }
        | Command::Prune(_)
        | Command::Checkpoint(_)
        | Command::Rescan { .. } => Agent::start(ask_password).await,
        _ => None,
    };
    match &cli.command {
        Command::Domains { disks } => list::domains(&service, *disks, json).await,
        Command::Create(create) => create::run(&service, create, json, ask_password).await,
        Command::Jobs { all } => list::jobs(&service, *all, json).await,
        Command::Show { job } => list::show(&service, *job, json).await,
        Command::Watch { job: Some(job) } => watch::one(&service, *job, json, ask_password).await,
        Command::Watch { job: None } => watch::all(&service, json).await,
        Command::Cancel { job, disk } => list::cancel(&service, *job, disk.as_deref(), json).await,
        Command::Speed { job, limit } => list::speed(&service, *job, *limit, json).await,
        Command::Dump { job } => list::dump(&service, *job, json).await,
        Command::Backups { domain, store, .. } => {
            backups::list(&service, domain.as_deref(), store.as_deref(), json).await
        }
        Command::Delete {
            backups,
            with_dependents,
            merge,
            dry_run,
        } => {
            let how = delete::Deletion {
                with_dependents: *with_dependents,
                merge: *merge,
                dry_run: *dry_run,
            };
            delete::run(&service, backups, how, json).await
        }
        Command::Protect { backups } => protect::run(&service, backups, true, json).await,
        Command::Unprotect { backups } => protect::run(&service, backups, false, json).await,
        Command::Prune(options) => prune::run(&service, options, json).await,
        Command::Checkpoints { domain } => checkpoints::list(&service, domain, json).await,
        Command::Checkpoint(command) => checkpoints::run(&service, command, json).await,
        Command::Rescan { adopt } => list::rescan(&service, *adopt, json).await,
        Command::Restore(args) => stored::remote::restore(&service, args, json, ask_password).await,
        Command::Verify(args) => stored::remote::verify(&service, args, json, ask_password).await,
        Command::Export(args) => stored::remote::export(&service, args, json, ask_password).await,
        // Handled before, because they need no bus.
        Command::Completions { .. } | Command::Man { .. } => Ok(Status::Completed),
    }
}
