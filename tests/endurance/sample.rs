//! Resource use after so many backups, as tables.

use std::collections::HashMap;
use std::fs;

use backupd::names::BUS_NAME;
use zbus::wire::Variant;

use crate::common::System;
use crate::common::measure::Footprint;
use crate::common::vm::Vm;

const KIB: u64 = 1 << 10;

/// The resources of the service, QEMU and the bus after so many backups.
pub struct Sample {
    pub backups: usize,
    pub service: Footprint,
    pub qemu: Footprint,
    /// Match rules of the service.
    pub rules: u32,
    /// Bytes.
    pub catalog: u64,
}

impl Sample {
    pub async fn take(system: &mut System, vm: &Vm, backups: usize) -> Self {
        Self {
            backups,
            service: Footprint::of(system.daemon().pid()),
            qemu: Footprint::of(vm.pid()),
            rules: on_the_bus(system, "MatchRules").await,
            catalog: catalog_size(system),
        }
    }
}

pub fn catalog_size(system: &System) -> u64 {
    let files = ["catalog.sqlite", "catalog.sqlite-wal"];
    let sizes = files.map(|file| fs::metadata(system.dir().join("state").join(file)));
    sizes.into_iter().flatten().map(|metadata| metadata.len()).sum()
}

/// Returns a counter of the bus for the service's connection.
pub async fn on_the_bus(system: &System, what: &str) -> u32 {
    let (bus, path) = ("org.freedesktop.DBus", "/org/freedesktop/DBus");
    let stats = Some("org.freedesktop.DBus.Debug.Stats");
    let connection = system.connect().await;
    let answer = connection
        .call_method(Some(bus), path, stats, "GetConnectionStats", &(BUS_NAME,))
        .await
        .unwrap();
    let body = answer.body();
    let mut counts: HashMap<String, Variant<'_>> = body.deserialize().unwrap();
    counts.remove(what).unwrap().try_into().unwrap()
}

pub fn print(samples: &[Sample]) {
    println!(
        "\n| backups | memory of the service | its descriptors | its threads | its match rules | the catalog | memory of QEMU | its descriptors |\n\
         | --- | --- | --- | --- | --- | --- | --- | --- |"
    );
    for sample in samples {
        let (service, qemu) = (&sample.service, &sample.qemu);
        println!(
            "| {} | {} KiB | {} | {} | {} | {} KiB | {} KiB | {} |",
            sample.backups,
            service.memory,
            service.descriptors,
            service.threads,
            sample.rules,
            sample.catalog / KIB,
            qemu.memory,
            qemu.descriptors,
        );
    }
}
