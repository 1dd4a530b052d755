//! A recorded sequence of launches, queued again by one call.

use cudarc::driver::{result, sys};

use super::{Cuda, check};
use crate::Result;

/// What [`Cuda::record`] recorded. The launches keep the addresses that they were recorded with: whoever runs a graph keeps the tensors
/// alive and where they are, and changes only what is in them.
#[derive(Debug)]
pub struct Graph {
    cuda: Cuda,
    graph: sys::CUgraph,
    executable: sys::CUgraphExec,
}

// SAFETY: the handles are opaque names that any thread may use; one thread at a time calls the ops of a GPU.
unsafe impl Send for Graph {}
// SAFETY: as above; shared access does nothing but queue.
unsafe impl Sync for Graph {}

impl Cuda {
    /// Records what `queue` launches, without running it. Everything that ops allocate or compile at first use must be there already, so
    /// the same ops run once before.
    ///
    /// # Errors
    /// What `queue` gives; [`crate::Error::Cuda`] if it did what cannot be recorded (an allocation, a wait).
    pub fn record(self, queue: impl FnOnce() -> Result<()>) -> Result<Graph> {
        self.bind()?;
        // SAFETY: the stream lives as long as the process. Other threads may go on allocating meanwhile.
        check("record", unsafe {
            result::stream::begin_capture(
                self.stream(),
                sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL,
            )
        })?;
        let queued = queue();
        // SAFETY: begun above; ends whatever `queue` said, so that the stream runs again.
        let graph = check("record", unsafe {
            result::stream::end_capture(self.stream())
        });
        queued?;
        let graph = graph?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph was made just now; what is made of it goes where the pointer says.
        let prepared = check("prepare a graph", unsafe {
            sys::cuGraphInstantiateWithFlags(&mut executable, graph, 0).result()
        });
        if let Err(error) = prepared {
            // SAFETY: as above, destroyed once.
            let _ = unsafe { result::graph::destroy(graph) };
            return Err(error);
        }
        Ok(Graph {
            cuda: self,
            graph,
            executable,
        })
    }
}

impl Graph {
    /// Queues all launches.
    ///
    /// # Errors
    /// [`crate::Error::Cuda`] if the GPU is gone.
    pub fn launch(&self) -> Result<()> {
        self.cuda.bind()?;
        // SAFETY: graph and stream are alive; the launches were checked when they were recorded, and their tensors are kept (see the type).
        check("launch a graph", unsafe {
            result::graph::launch(self.executable, self.cuda.stream())
        })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.cuda.bind().is_err() {
            return;
        }
        // SAFETY: made in `record`, destroyed once; the driver keeps what is still running.
        unsafe {
            let _ = result::graph::exec_destroy(self.executable);
            let _ = result::graph::destroy(self.graph);
        }
    }
}
