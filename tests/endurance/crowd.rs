//! Many domains at once, most of them played by the test.

use std::os::fd::OwnedFd;

use futures_util::future::join_all;
use futures_util::stream::{self, StreamExt};

use crate::common::System;
use crate::common::caller::Caller;
use crate::common::peer::StandIn;
use crate::common::vm::Vm;

/// The domains that one connection has registered.
pub struct Crowd<'a> {
    caller: Caller,
    machines: &'a [Vm],
    stand_ins: Vec<StandIn>,
}

impl<'a> Crowd<'a> {
    /// Registers all of them at once: these VMs, and stand-ins up to this number.
    pub async fn register(system: &System, machines: &'a [Vm], number: usize) -> Self {
        let caller = Caller::new(system).await;
        let names = machines.iter().map(|vm| vm.name().to_owned());
        let sockets = machines.iter().map(|vm| OwnedFd::from(vm.monitor_stream()));
        let (mut names, mut sockets): (Vec<_>, Vec<_>) = (names.collect(), sockets.collect());
        let mut stand_ins = Vec::new();
        for index in machines.len()..number {
            let (socket, stand_in) = StandIn::start();
            names.push(format!("stand-in-{index}"));
            sockets.push(socket);
            stand_ins.push(stand_in);
        }
        // As many at a time as the bus allows pending replies of one connection.
        stream::iter(names.iter().zip(sockets))
            .map(|(name, socket)| caller.register(name, socket))
            .buffer_unordered(64)
            .for_each(async |registered| drop(registered.unwrap()))
            .await;
        Self {
            caller,
            machines,
            stand_ins,
        }
    }

    pub async fn back_up(&self) {
        join_all(self.machines.iter().map(|vm| self.caller.complete(vm.name(), ""))).await;
    }

    pub fn commands(&self) -> usize {
        self.stand_ins.iter().map(StandIn::commands).sum()
    }

    /// Half of the stand-ins close their connection; the rest ends with the connection that registered it.
    pub async fn leave(mut self) {
        self.stand_ins.truncate(self.stand_ins.len() / 2);
        self.caller.connection.close().await.unwrap();
    }
}
