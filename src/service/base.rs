//! Chooses the base of a new backup, and locks it against removal.

use super::Service;
use crate::checkpoint::Mode;
use crate::definition::Definition;
use crate::domain::{Domain, Snapshot};
use crate::error::Result;
use crate::job;
use crate::offload::Progress;
use crate::plan::{self, Incremental, Options, Plan};
use crate::targets::{self, Bases};

impl Service {
    /// Makes the plan, and locks its bases against removal. If a base is removed in between and the service chose it,
    /// the service chooses once more without it.
    pub(super) async fn plan(
        &self,
        (definition, options, files): (&Definition, &Options, usize),
        domain: &Domain,
        snapshot: &Snapshot,
    ) -> Result<(Plan, Bases)> {
        let options = &self.with_defaults(options, domain).await?;
        let mut store = match plan::store(definition, &self.stores)? {
            Some(store) => {
                domain.require_lasting_owner()?;
                Some(self.jobs.choose_store(domain, &snapshot.disks, store).await?)
            }
            None => None,
        };
        let may_choose = matches!(options.incremental, None | Some(Incremental::Auto));
        let mut chosen_before = false;
        loop {
            let plan = plan::resolve(
                definition,
                options,
                &snapshot.disks,
                &snapshot.outside,
                store.clone(),
                files,
            )?;
            let bases: Vec<String> = plan.disks.iter().filter_map(base).collect();
            let error = match self.hold(plan).await? {
                Ok(held) => return Ok(held),
                Err(error) if !may_choose || chosen_before => return Err(error.into()),
                Err(error) => error,
            };
            tracing::info!(
                domain = domain.name, %error,
                "the base is being removed, so the service chooses another one"
            );
            chosen_before = true;
            let candidates = store.iter_mut().flat_map(|store| &mut store.candidates.backups);
            let gone = candidates.filter(|candidate| bases.contains(&candidate.id));
            gone.flat_map(|candidate| &mut candidate.disks)
                .for_each(|disk| disk.images = None);
        }
    }

    /// Completes the options from the configuration, and refuses options that this QEMU does not support.
    async fn with_defaults(&self, options: &Options, domain: &Domain) -> Result<Options> {
        let most = options
            .max_latency
            .or(domain.max_latency)
            .unwrap_or(self.max_latency);
        if most > 0 && !job::can_follow_latency(&domain.link().await?.schema) {
            return Err(job::Error::NoHistograms.into());
        }
        Ok(Options {
            max_latency: Some(most),
            ..options.clone()
        })
    }

    async fn hold(&self, plan: Plan) -> Result<std::result::Result<(Plan, Bases), targets::Error>> {
        let hold = move |_: &Progress| Bases::lock(&plan).map(|bases| (plan, bases));
        Ok(self.jobs.in_store(hold).await?)
    }
}

fn base(disk: &plan::DiskPlan) -> Option<String> {
    match &disk.mode {
        Mode::Incremental(base) => Some(base.backup.clone()),
        Mode::Full { .. } => None,
    }
}
