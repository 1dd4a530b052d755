//! Several processes that train one model: who does what, and the sums and copies between them.
//!
//! Every rank holds the weights and computes whole micro-batches; the moments of a tensor lie with its owner alone, who gets the sum of
//! its gradient, updates it and sends it to all. Small things, and everything on a CPU, go through rank 0 by TCP ([`hub`]), which adds in
//! the order of ranks; tensors on GPUs go through NCCL. What each rank does follows from its number alone, so that a run can go on with
//! another number of ranks.

mod hub;
mod owners;
mod rendezvous;

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kernel::cuda::Cuda;
use kernel::cuda::nccl::{Communicator, Id};
use kernel::tensor::Storage;
use kernel::{Device, Tensor};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

use hub::Hub;
pub use owners::Owners;
pub use rendezvous::Place;

/// How long ranks wait for each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Until all have joined at the start.
    pub rendezvous: Duration,
    /// For a rank that others cannot go on without, in every collective operation.
    pub collective: Duration,
    /// Without a heartbeat of a process, after which it counts as gone.
    pub silence: Duration,
    /// Between two heartbeats.
    pub heartbeat: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            rendezvous: Duration::from_secs(600),
            collective: Duration::from_secs(1800),
            silence: Duration::from_secs(60),
            heartbeat: Duration::from_secs(5),
        }
    }
}

/// This process among those of a run; cheap to clone.
#[derive(Debug, Clone)]
pub struct Ranks(Arc<Group>);

#[derive(Debug)]
struct Group {
    rank: usize,
    n_ranks: usize,
    /// None for a process that was not launched as one of a run.
    hub: Option<Hub>,
    nccl: Option<Communicator>,
    /// See [`Limits::collective`].
    collective: Duration,
}

impl Ranks {
    /// A process of its own.
    pub fn alone() -> Self {
        Ranks(Arc::new(Group {
            rank: 0,
            n_ranks: 1,
            hub: None,
            nccl: None,
            collective: Limits::default().collective,
        }))
    }

    /// Connects to the other ranks. With a GPU of its own each, their tensors go through NCCL, also where there is but one rank.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] if not all join; [`Error::Kernel`] without NCCL, or if the GPUs cannot reach each other; [`Error::RanksDiffer`]
    /// if some ranks have a GPU and some have none.
    pub fn join(place: &Place, limits: Limits, device: Device) -> Result<Self> {
        let mut group = Group {
            rank: place.rank,
            n_ranks: place.n_ranks,
            hub: Some(rendezvous::rendezvous(place, limits)?),
            nccl: None,
            collective: limits.collective,
        };
        let communicator = group.communicator(device);
        if let (Err(error), Some(hub)) = (&communicator, &group.hub) {
            hub.fail(&error.to_string());
        }
        group.nccl = communicator?;
        Ok(Ranks(Arc::new(group)))
    }

    /// This process's number, from 0.
    pub fn rank(&self) -> usize {
        self.0.rank
    }

    /// How many processes train together.
    pub fn n_ranks(&self) -> usize {
        self.0.n_ranks
    }

    /// Whether this rank speaks for all: it prints, and it alone reads and writes the run's folder.
    pub fn is_first(&self) -> bool {
        self.0.rank == 0
    }

    /// Whether this rank computes the micro-batch (or batch of held-out rows) with this number: they go to the ranks round-robin.
    pub fn has_batch(&self, batch_idx: usize) -> bool {
        batch_idx % self.0.n_ranks == self.0.rank
    }

    /// Tells the other ranks that this one cannot go on. They stop with `what`, and the rank's number.
    pub fn fail(&self, what: &str) {
        if let Some(hub) = &self.0.hub {
            hub.fail(what);
        }
    }

    /// Ends this rank's part in good order. Without it the others take its end for a failure.
    pub fn leave(&self) {
        if let Some(hub) = &self.0.hub {
            hub.leave();
        }
    }

    /// Adds `values` over all ranks, in the order of ranks: all have the same sums afterwards.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank is gone.
    pub fn sum(&self, values: &mut [f64]) -> Result<()> {
        self.0.combine(values, |sum, value| sum + value)
    }

    /// Whether any rank says so.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank is gone.
    pub fn any(&self, here: bool) -> Result<bool> {
        let mut votes = [f64::from(u8::from(here))];
        self.sum(&mut votes)?;
        Ok(votes[0] > 0.0)
    }

    /// The least of what the ranks say, on all ranks.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank is gone.
    pub fn least(&self, here: usize) -> Result<usize> {
        let mut values = [here as f64];
        self.0.combine(&mut values, f64::min)?;
        Ok(values[0] as usize)
    }

    /// What rank 0 says, on all ranks; what the others hand in is not looked at.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank is gone.
    pub fn from_first(&self, said: Vec<u8>) -> Result<Vec<u8>> {
        let Some(hub) = self.0.hub.as_ref().filter(|_| self.0.n_ranks > 1) else {
            return Ok(said);
        };
        if !self.is_first() {
            return hub.receive(0);
        }
        for peer in 1..self.0.n_ranks {
            hub.send(peer, &said)?;
        }
        Ok(said)
    }

    /// Makes sure that what is to be done, key by key, is the same on all ranks.
    ///
    /// # Errors
    /// [`Error::RanksDiffer`] on a rank that has something else than rank 0, which the others then hear of.
    pub fn require_same(&self, here: &Map<String, Value>) -> Result<()> {
        let first = self.from_first(Value::Object(here.clone()).to_string().into_bytes())?;
        let first: Map<String, Value> = serde_json::from_slice(&first).unwrap_or_default();
        for (key, value) in here {
            let theirs = first.get(key).map_or("absent".to_owned(), Value::to_string);
            self.0
                .require_equal(key, theirs.as_bytes(), &value.to_string())?;
        }
        Ok(())
    }

    /// Sums each gradient over all ranks into its owner's; the other ranks' are of no use afterwards.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank is gone, [`Error::Kernel`] if a GPU or a transfer failed.
    pub fn reduce_to_owners(&self, gradients: &mut [Tensor], owners: &Owners) -> Result<()> {
        if let Some(nccl) = &self.0.nccl {
            return self
                .0
                .watched(|go_on| nccl.reduce(gradients, owners.ranks(), go_on));
        }
        let Some(hub) = self.0.hub.as_ref().filter(|_| self.0.n_ranks > 1) else {
            return Ok(());
        };
        for (gradient, owner) in gradients.iter_mut().zip(owners.ranks()) {
            if !self.is_first() {
                hub.send(0, &host_bytes(gradient)?)?;
                if *owner == self.0.rank {
                    set_host_bytes(gradient, &hub.receive(0)?)?;
                }
                continue;
            }
            for peer in 1..self.0.n_ranks {
                let bytes = hub.receive(peer)?;
                let (theirs, _) = bytes.as_chunks::<4>();
                let ours = gradient.f32s_mut();
                self.0.require_length(peer, theirs.len(), ours.len())?;
                for (sum, theirs) in ours.iter_mut().zip(theirs) {
                    *sum += f32::from_le_bytes(*theirs);
                }
            }
            if *owner > 0 {
                hub.send(*owner, &host_bytes(gradient)?)?;
            }
        }
        Ok(())
    }

    /// Copies each tensor from its owner to all ranks.
    ///
    /// # Errors
    /// As [`Ranks::reduce_to_owners`].
    pub fn copy_from_owners(&self, mut tensors: Vec<&mut Tensor>, owners: &Owners) -> Result<()> {
        self.copy(&mut tensors, owners.ranks())
    }

    /// Copies all tensors from rank 0 to all ranks.
    ///
    /// # Errors
    /// As [`Ranks::reduce_to_owners`].
    pub fn copy_from_first(&self, mut tensors: Vec<&mut Tensor>) -> Result<()> {
        let roots = vec![0; tensors.len()];
        self.copy(&mut tensors, &roots)
    }

    fn copy(&self, tensors: &mut [&mut Tensor], roots: &[usize]) -> Result<()> {
        if let Some(nccl) = &self.0.nccl {
            return self
                .0
                .watched(|go_on| nccl.broadcast(tensors, roots, go_on));
        }
        let Some(hub) = self.0.hub.as_ref().filter(|_| self.0.n_ranks > 1) else {
            return Ok(());
        };
        for (tensor, root) in tensors.iter_mut().zip(roots) {
            if !self.is_first() {
                match *root == self.0.rank {
                    true => hub.send(0, &host_bytes(tensor)?)?,
                    false => set_host_bytes(tensor, &hub.receive(0)?)?,
                }
                continue;
            }
            if *root > 0 {
                set_host_bytes(tensor, &hub.receive(*root)?)?;
            }
            for peer in (1..self.0.n_ranks).filter(|peer| peer != root) {
                hub.send(peer, &host_bytes(tensor)?)?;
            }
        }
        Ok(())
    }

    /// Sends bytes to `peer`: between rank 0 and another alone. None is sent by a process of its own.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank is gone.
    pub(crate) fn send(&self, peer: usize, bytes: &[u8]) -> Result<()> {
        match &self.0.hub {
            Some(hub) => hub.send(peer, bytes),
            None => Ok(()),
        }
    }

    /// The next bytes that `peer` sent.
    ///
    /// # Errors
    /// [`Error::Rank`] if a rank is gone.
    pub(crate) fn receive(&self, peer: usize) -> Result<Vec<u8>> {
        match &self.0.hub {
            Some(hub) => hub.receive(peer),
            None => Ok(Vec::new()),
        }
    }
}

impl Group {
    /// A communicator where the device is a GPU. All ranks must have the same kind of device.
    fn communicator(&self, device: Device) -> Result<Option<Communicator>> {
        let (kind, cuda): (_, Option<Cuda>) = match device {
            Device::Cpu => ("cpu", None),
            Device::Cuda(cuda) => ("cuda", Some(cuda)),
        };
        // Rank 0's kind of device, then the id of its communicator.
        let mut said = kind.as_bytes().to_vec();
        if let (0, Some(_)) = (self.rank, cuda) {
            said.push(b' ');
            said.extend_from_slice(&Id::new()?.0);
        }
        if let Some(hub) = self.hub.as_ref().filter(|_| self.n_ranks > 1) {
            if self.rank > 0 {
                said = hub.receive(0)?;
            } else {
                for peer in 1..self.n_ranks {
                    hub.send(peer, &said)?;
                }
            }
        }
        let end = said
            .iter()
            .position(|byte| *byte == b' ')
            .unwrap_or(said.len());
        self.require_equal("the kind of device", &said[..end], kind)?;
        let Some(cuda) = cuda else {
            return Ok(None);
        };
        let id = said.get(end + 1..).and_then(Id::from_bytes);
        let id = id.ok_or_else(|| Error::Rank {
            rank: 0,
            what: "its NCCL id has not as many bytes as one has here".to_owned(),
        })?;
        self.watched(|go_on| Communicator::join(cuda, id, self.rank, self.n_ranks, go_on))
            .map(Some)
    }

    /// Runs what waits for other GPUs; a rank that failed meanwhile is the reason that is told.
    fn watched<T>(
        &self,
        work: impl FnOnce(kernel::cuda::nccl::GoOn) -> kernel::Result<T>,
    ) -> Result<T> {
        let started = Instant::now();
        let is_whole = || self.hub.as_ref().is_none_or(Hub::is_whole);
        let done = work(&|| is_whole() && started.elapsed() < self.collective);
        if done.is_err()
            && let Some(hub) = &self.hub
        {
            // NCCL may notice before the hub does that a process is gone, but does not know which.
            let noticed = Instant::now();
            while hub.is_whole() && noticed.elapsed() < Duration::from_secs(1) {
                std::thread::sleep(Duration::from_millis(20));
            }
            hub.check()?;
        }
        Ok(done?)
    }

    /// Takes the values of all ranks together, one by one in the order of ranks, and gives all ranks the outcome.
    fn combine(&self, values: &mut [f64], with: fn(f64, f64) -> f64) -> Result<()> {
        let Some(hub) = self.hub.as_ref().filter(|_| self.n_ranks > 1) else {
            return Ok(());
        };
        let bytes = |values: &[f64]| -> Vec<u8> {
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .collect()
        };
        if self.rank > 0 {
            hub.send(0, &bytes(values))?;
            let combined = hub.receive(0)?;
            let (combined, _) = combined.as_chunks::<8>();
            self.require_length(0, combined.len(), values.len())?;
            for (value, combined) in values.iter_mut().zip(combined) {
                *value = f64::from_le_bytes(*combined);
            }
            return Ok(());
        }
        for peer in 1..self.n_ranks {
            let theirs = hub.receive(peer)?;
            let (theirs, _) = theirs.as_chunks::<8>();
            self.require_length(peer, theirs.len(), values.len())?;
            for (value, theirs) in values.iter_mut().zip(theirs) {
                *value = with(*value, f64::from_le_bytes(*theirs));
            }
        }
        for peer in 1..self.n_ranks {
            hub.send(peer, &bytes(values))?;
        }
        Ok(())
    }

    /// Ranks that do the same thing send as much as the others expect.
    fn require_length(&self, peer: usize, got: usize, expected: usize) -> Result<()> {
        match got == expected {
            true => Ok(()),
            false => Err(Error::Rank {
                rank: peer,
                what: format!(
                    "it sent {got} numbers where rank {} expects {expected}: it does something else",
                    self.rank
                ),
            }),
        }
    }

    fn require_equal(&self, what: &str, first: &[u8], here: &str) -> Result<()> {
        match first == here.as_bytes() {
            true => Ok(()),
            false => Err(Error::RanksDiffer {
                what: what.to_owned(),
                rank: self.rank,
                here: here.to_owned(),
                first: String::from_utf8_lossy(first).into_owned(),
            }),
        }
    }
}

/// The elements of a tensor as they lie in memory.
pub(crate) fn host_bytes(tensor: &Tensor) -> Result<Cow<'_, [u8]>> {
    Ok(match tensor.storage() {
        Storage::F32(data) => bytemuck::cast_slice(data).into(),
        Storage::Bf16(data) => bytemuck::cast_slice(data).into(),
        Storage::Cuda(..) => match tensor.to_device(Device::Cpu)?.storage() {
            Storage::F32(data) => bytemuck::cast_slice(data).to_vec().into(),
            Storage::Bf16(data) => bytemuck::cast_slice(data).to_vec().into(),
            Storage::Cuda(..) => unreachable!("copied to the host"),
        },
    })
}

/// The reverse of [`host_bytes`], for a tensor of the same shape and type.
pub(crate) fn set_host_bytes(tensor: &mut Tensor, bytes: &[u8]) -> Result<()> {
    match tensor.storage_mut() {
        Storage::F32(data) => copy_sent(bytemuck::cast_slice_mut(data), bytes),
        Storage::Bf16(data) => copy_sent(bytemuck::cast_slice_mut(data), bytes),
        Storage::Cuda(..) => {
            let mut host = Tensor::zeros(tensor.shape(), tensor.dtype());
            set_host_bytes(&mut host, bytes)?;
            Ok(tensor.copy_from(&host)?)
        }
    }
}

/// Copies what rank 0 sent for a tensor of as many bytes.
pub(crate) fn copy_sent(to: &mut [u8], bytes: &[u8]) -> Result<()> {
    if bytes.len() != to.len() {
        return Err(Error::Rank {
            rank: 0,
            what: format!(
                "it sent {} bytes for a tensor of {}: it trains another model",
                bytes.len(),
                to.len()
            ),
        });
    }
    to.copy_from_slice(bytes);
    Ok(())
}
