//! Calls of ordinary users, through `gdbus`: it tells errors by their names, and may let the user be asked.

use super::System;
use super::clients::Clients;
use super::dialog::Agent;
use super::process::{Output, Process};

const BUS_NAME: &str = "org.example.Backup1";
const ROOT_PATH: &str = "/org/example/Backup1";
const CREATE: &str = "org.example.Backup1.CreateBackup";
/// In seconds; longer than any test waits, so that it is the service that ends a call.
const TIMEOUT: &str = "120";

/// The name and the text of the error that a call ended with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    pub name: String,
    pub text: String,
}

impl Refusal {
    /// From what `gdbus call` wrote to standard error.
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

/// The end of a call: what it answered, or its error.
#[track_caller]
pub fn outcome(output: Output) -> Result<String, Refusal> {
    if output.success() {
        return Ok(output.stdout.trim().to_owned());
    }
    Err(Refusal::read(&output.stderr))
}

/// A method of the root object, without asking anybody for a password. Arguments are GVariant text.
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

/// The same of any object; the method with its interface.
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

/// `CreateBackup` without asking anybody for a password.
#[track_caller]
pub fn create(clients: &Clients, uid: u32, domain: &str, document: &str) -> Result<String, Refusal> {
    let arguments = [&text(domain), &text(document), "@ah []", "@a{sv} {}"];
    call(clients, uid, "CreateBackup", &arguments)
}

/// `CreateBackup` whose user may be asked, by this agent. Its end is [`end_of`].
pub async fn create_asking(system: &System, agent: &Agent, name: &str, uid: u32, domain: &str) -> Process {
    let arguments = [&text(domain), "''", "@ah []", "@a{sv} {}"];
    asking(system, agent, (name, uid), (ROOT_PATH, CREATE), &arguments).await
}

/// A call of an object's method, with its interface, whose user may be asked, by this agent. `as_whom` are the process's name
/// and user.
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

/// A string as GVariant text.
fn text(value: &str) -> String {
    format!("'{}'", value.replace('\\', "\\\\").replace('\'', "\\'"))
}
