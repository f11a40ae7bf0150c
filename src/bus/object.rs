//! Looks up objects for a caller. An object that the caller may not see does not exist for that caller.
//!
//! Objects have no state here: a path is looked up among domains, jobs and backups. For a hidden object the reply is
//! the same, byte for byte, as for a path that never existed.

use std::sync::Arc;

use zbus::wire::Variant;

use super::call::Call;
use super::error::Result;
use super::{Context, backup_path, domain_path, job_path};
use crate::catalog::Backup;
use crate::domain::Domain;
use crate::job::Job;
use crate::names::{BACKUP_INTERFACE, DOMAIN_INTERFACE, JOB_INTERFACE, MANAGER_INTERFACE, ROOT_PATH};

/// The properties of an object, by name.
pub type Properties = Vec<(&'static str, Variant<'static>)>;

/// An object that the caller may see.
pub enum Object {
    Root,
    Domain(Arc<Domain>),
    Job(Arc<Job>),
    Backup(Box<Backup>),
    /// A path above the root object; holds the next part of the root's path.
    Above(&'static str),
    /// The parents of all domains, all jobs and all backups.
    Domains,
    Jobs,
    Backups,
}

impl Object {
    /// The object's interface beside the standard ones.
    pub fn interface(&self) -> Option<&'static str> {
        match self {
            Self::Root => Some(MANAGER_INTERFACE),
            Self::Domain(_) => Some(DOMAIN_INTERFACE),
            Self::Job(_) => Some(JOB_INTERFACE),
            Self::Backup(_) => Some(BACKUP_INTERFACE),
            Self::Above(_) | Self::Domains | Self::Jobs | Self::Backups => None,
        }
    }
}

impl Context {
    /// The object at the call's path.
    pub async fn object(&self, call: &Call) -> Result<Option<Object>> {
        let path = call.path.as_str();
        let Some(below) = path.strip_prefix(ROOT_PATH) else {
            return Ok(above(path).map(Object::Above));
        };
        Ok(match below.split('/').collect::<Vec<_>>().as_slice() {
            [""] => Some(Object::Root),
            ["", "domain"] => Some(Object::Domains),
            ["", "job"] => Some(Object::Jobs),
            ["", "backup"] => Some(Object::Backups),
            ["", "domain", id] => {
                let id = u64::from_str_radix(id, 16)
                    .ok()
                    .filter(|id| domain_path(*id).as_str() == path);
                let Some(id) = id else { return Ok(None) };
                let domain = self.service.domain_of_id(&call.caller, id).await?;
                domain.map(Object::Domain)
            }
            ["", "job", id] => {
                let id = id.parse().ok().filter(|id| job_path(*id).as_str() == path);
                let Some(id) = id else { return Ok(None) };
                let job = self.service.job_of_id(&call.caller, id).await?;
                job.map(Object::Job)
            }
            ["", "backup", object] => {
                let object = u64::from_str_radix(object, 16)
                    .ok()
                    .filter(|object| backup_path(*object).as_str() == path);
                let Some(object) = object else { return Ok(None) };
                let backup = self.service.backup(&call.caller, object).await?;
                backup.map(|backup| Object::Backup(Box::new(backup)))
            }
            _ => None,
        })
    }
}

/// The next part of the root's path after `path`.
fn above(path: &str) -> Option<&'static str> {
    let rest = match path {
        "" => None,
        "/" => ROOT_PATH.strip_prefix('/'),
        path => ROOT_PATH.strip_prefix(path)?.strip_prefix('/'),
    };
    rest?.split('/').next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_paths_above_the_root_lead_to_it() {
        assert_eq!(above("/"), Some("org"));
        assert_eq!(above("/org"), Some("example"));
        assert_eq!(above("/org/example"), Some("Backup1"));
        for path in ["", "/or", "/org/", "/org/exampl", "/com"] {
            assert_eq!(above(path), None, "{path:?}");
        }
    }
}
