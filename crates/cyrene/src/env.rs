//! Every environment variable the program reads.

/// Another host that speaks the Hub's protocol; default is the Hub itself.
pub const HF_ENDPOINT: &str = "HF_ENDPOINT";
/// Token for gated or private repositories.
pub const HF_TOKEN: &str = "HF_TOKEN";
/// Log filter, as `tracing-subscriber` reads it; `--verbose` is the short way.
pub const CYRENE_LOG: &str = "CYRENE_LOG";
/// Set to anything: no colours (no-color.org).
pub const NO_COLOR: &str = "NO_COLOR";
/// Number of this process among those of a training run, as torchrun and Kubernetes' training jobs set it.
pub const RANK: &str = "RANK";
/// Processes of the run.
pub const WORLD_SIZE: &str = "WORLD_SIZE";
/// Number among the processes of one host.
pub const LOCAL_RANK: &str = "LOCAL_RANK";
/// Host of rank 0, for all launchers.
pub const MASTER_ADDR: &str = "MASTER_ADDR";
/// Port of rank 0, for all launchers.
pub const MASTER_PORT: &str = "MASTER_PORT";
/// `True` where torchrun itself listens on `MASTER_PORT`.
pub const TORCHELASTIC_USE_AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";
/// Open MPI's names.
pub const OMPI_RANK: &str = "OMPI_COMM_WORLD_RANK";
pub const OMPI_SIZE: &str = "OMPI_COMM_WORLD_SIZE";
pub const OMPI_LOCAL_RANK: &str = "OMPI_COMM_WORLD_LOCAL_RANK";
pub const OMPI_LOCAL_SIZE: &str = "OMPI_COMM_WORLD_LOCAL_SIZE";
/// Slurm's names; tasks and hosts are those of the step that srun started, not of the job.
pub const SLURM_PROCID: &str = "SLURM_PROCID";
pub const SLURM_TASKS: &str = "SLURM_STEP_NUM_TASKS";
pub const SLURM_LOCALID: &str = "SLURM_LOCALID";
pub const SLURM_NODELIST: &str = "SLURM_STEP_NODELIST";
pub const SLURM_JOB_ID: &str = "SLURM_JOB_ID";

/// Where programs of this user keep what can be made again; `None` where the system names no such place.
pub fn cache_dir() -> Option<std::path::PathBuf> {
    let base = if cfg!(windows) {
        get("LOCALAPPDATA").map(std::path::PathBuf::from)?
    } else {
        match get("XDG_CACHE_HOME") {
            Some(dir) => dir.into(),
            None => std::path::PathBuf::from(get("HOME")?).join(".cache"),
        }
    };
    Some(base.join("cyrene"))
}

/// The value, unless unset, empty or not UTF-8.
pub fn get(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}
