//! Reads and writes the parts of a job's record that all kinds of jobs have.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Error;
use crate::catalog::{self, DomainRecord, JobRecord};
use crate::domain::{Identity, Origin};
use crate::plan::JobSpec;

pub fn domain_record(identity: Identity) -> DomainRecord {
    DomainRecord {
        name: identity.name,
        source: identity.origin.as_str().to_owned(),
        owner: identity.owner,
        owner_name: identity.owner_name,
        uuid: identity.uuid,
    }
}

pub fn identity(id: u32, domain: &DomainRecord) -> Result<Identity, Error> {
    let DomainRecord {
        name,
        source,
        owner,
        owner_name,
        uuid,
    } = domain.clone();
    let origin = Origin::parse(&source).ok_or_else(|| unreadable(id, "its domain's source"))?;
    Ok(Identity {
        name,
        origin,
        owner,
        owner_name,
        uuid,
    })
}

/// Serialises what a job does for the catalog.
pub fn spec_to_text(spec: &JobSpec) -> Result<String, Error> {
    spec.to_record()
        .map_err(|error| Error::Catalog(error.to_string()))
}

/// Serialises a value for the catalog.
pub fn to_text<T: Serialize>(value: &T) -> Result<String, Error> {
    serde_json::to_string(value).map_err(|error| Error::Catalog(error.to_string()))
}

/// Returns what a recorded job does.
pub fn spec(record: &JobRecord) -> Result<JobSpec, Error> {
    JobSpec::from_record(&record.plan).map_err(|error| unreadable(record.id, &error.to_string()))
}

/// Parses a part of a record.
pub fn read<T: DeserializeOwned>(id: u32, text: Option<&str>) -> Result<T, Error> {
    let text = text.ok_or_else(|| unreadable(id, "a part is missing"))?;
    serde_json::from_str(text).map_err(|error| unreadable(id, &error.to_string()))
}

pub fn unreadable(id: u32, why: &str) -> Error {
    let why = why.to_owned();
    catalog::Error::Record { id, why }.into()
}
