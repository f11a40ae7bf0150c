//! Calls of ordinary users through `gdbus`, which prints the names of errors and can allow interactive authorization.

use super::System;
use super::clients::Clients;
use super::dialog::Agent;
use super::process::{Output, Process};

const BUS_NAME: &str = "org.example.Backup1";
const ROOT_PATH: &str = "/org/example/Backup1";
const CREATE: &str = "org.example.Backup1.CreateBackup";
/// The timeout in seconds: longer than any test waits, so that only the service ends a call.
const TIMEOUT: &str = "120";

/// The name and the text of the error of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub name: String,
    pub text: String,
}

impl Refusal {
    /// Parses the standard error of `gdbus call`.
    #[track_caller]
    pub fn read(stderr: &str) -> Self {
        let error = stderr.trim().strip_prefix("Error: GDBus.Error:");
        let (name, text) = error
            .and_then(|error| error.split_once(": "))
            .unwrap_or_else(|| panic!("not an error that the service answered: {stderr}"));
        Self {
            name: name.to_owned(),
            text: text.to_owned(),
        }
    }
}

/// Returns the reply of a call, or its error.
#[track_caller]
pub fn outcome(output: Output) -> Result<String, Refusal> {
    if output.success() {
        return Ok(output.stdout.trim().to_owned());
    }
    Err(Refusal::read(&output.stderr))
}

/// Calls a method of the root object without interactive authorization. Arguments are GVariant text.
#[track_caller]
pub fn call(clients: &Clients, uid: u32, method: &str, arguments: &[&str]) -> Result<String, Refusal> {
    call_on(
        clients,
        uid,
        ROOT_PATH,
        &format!("{BUS_NAME}.{method}"),
        arguments,
    )
}

/// Calls a method, named with its interface, of any object.
#[track_caller]
pub fn call_on(
    clients: &Clients,
    uid: u32,
    path: &str,
    method: &str,
    arguments: &[&str],
) -> Result<String, Refusal> {
    outcome(clients.gdbus_call(uid, BUS_NAME, path, method, arguments))
}

/// Calls `CreateBackup` without interactive authorization.
#[track_caller]
pub fn create(clients: &Clients, uid: u32, domain: &str, document: &str) -> Result<String, Refusal> {
    let arguments = [&text(domain), &text(document), "@ah []", "@a{sv} {}"];
    call(clients, uid, "CreateBackup", &arguments)
}

/// Calls `CreateBackup` with interactive authorization through this agent. [`end_of`] returns its end.
pub async fn create_asking(system: &System, agent: &Agent, name: &str, uid: u32, domain: &str) -> Process {
    let arguments = [&text(domain), "''", "@ah []", "@a{sv} {}"];
    asking(system, agent, (name, uid), (ROOT_PATH, CREATE), &arguments).await
}

/// Calls a method, named with its interface, with interactive authorization through this agent. `as_whom` holds the
/// name and the user of the process.
pub async fn asking(
    system: &System,
    agent: &Agent,
    as_whom: (&str, u32),
    (path, method): (&str, &str),
    arguments: &[&str],
) -> Process {
    let ((name, uid), options) = (
        as_whom,
        ["call", "--system", "--interactive", "--timeout", TIMEOUT],
    );
    let of_what = ["--dest", BUS_NAME, "--object-path", path, "--method", method];
    let arguments = [&options[..], &of_what, arguments].concat();
    agent.run(system, name, uid, "gdbus", &arguments).await
}

/// Waits for the end of a call.
#[track_caller]
pub fn end_of(call: &mut Process) -> Result<String, Refusal> {
    let status = call.wait();
    outcome(Output {
        status,
        stdout: call.stdout(),
        stderr: call.log(),
    })
}

/// Quotes a string as GVariant text.
fn text(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}
