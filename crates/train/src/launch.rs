//! Whether this process was started as one of several, and its place among them, from the variables that launchers set: torchrun and
//! Kubernetes' training jobs (RANK, WORLD_SIZE, ...), Open MPI's mpirun, and srun.

use crate::error::{Error, Result};
use crate::ranks::Place;

/// Number of this process among those of a training run, as torchrun and Kubernetes' training jobs set it.
const RANK: &str = "RANK";
/// Processes of the run.
const WORLD_SIZE: &str = "WORLD_SIZE";
/// Number among the processes of one host.
const LOCAL_RANK: &str = "LOCAL_RANK";
/// Host of rank 0, for all launchers.
const MASTER_ADDR: &str = "MASTER_ADDR";
/// Port of rank 0, for all launchers.
const MASTER_PORT: &str = "MASTER_PORT";
/// `True` where torchrun itself listens on `MASTER_PORT`.
const TORCHELASTIC_USE_AGENT_STORE: &str = "TORCHELASTIC_USE_AGENT_STORE";
/// Open MPI's names.
const OMPI_RANK: &str = "OMPI_COMM_WORLD_RANK";
const OMPI_SIZE: &str = "OMPI_COMM_WORLD_SIZE";
const OMPI_LOCAL_RANK: &str = "OMPI_COMM_WORLD_LOCAL_RANK";
const OMPI_LOCAL_SIZE: &str = "OMPI_COMM_WORLD_LOCAL_SIZE";
/// Slurm's names; tasks and hosts are those of the step that srun started, not of the job.
const SLURM_PROCID: &str = "SLURM_PROCID";
const SLURM_TASKS: &str = "SLURM_STEP_NUM_TASKS";
const SLURM_LOCALID: &str = "SLURM_LOCALID";
const SLURM_NODELIST: &str = "SLURM_STEP_NODELIST";
const SLURM_JOB_ID: &str = "SLURM_JOB_ID";

/// Where rank 0 listens if nothing says otherwise; torchrun's own default.
const PORT: u16 = 29500;

/// One process of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// Number among all processes of the run.
    pub rank: usize,
    /// Processes of the run.
    pub n_ranks: usize,
    /// Number among the processes of this host: that of its GPU.
    pub local_rank: usize,
    host: String,
    ports: Vec<u16>,
}

impl Launch {
    /// The place of this process in a run of what `run` says.
    pub fn place(&self, run: String) -> Place {
        Place {
            rank: self.rank,
            n_ranks: self.n_ranks,
            host: self.host.clone(),
            ports: self.ports.clone(),
            run,
        }
    }

    /// `--device` for this process: where it names no GPU by number, the one with the process's own number on its host, or the only one
    /// that the launcher shows it.
    pub fn device(&self, asked: &str, n_gpus: usize) -> String {
        match (asked, n_gpus) {
            ("auto", 0) => "cpu".to_owned(),
            ("auto" | "cuda", 1) => "cuda:0".to_owned(),
            ("auto" | "cuda", _) => format!("cuda:{}", self.local_rank),
            _ => asked.to_owned(),
        }
    }
}

/// Reads the variables through `get`; None for a process that was started by itself.
///
/// # Errors
/// [`Error::RankUnset`], [`Error::RankBeyond`], [`Error::MasterUnset`], [`Error::Variable`].
pub fn from_env(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Launch>> {
    let number = |name| number(get, name);
    let Some(Started {
        rank,
        n_ranks,
        local_rank,
        host,
    }) = started(get)?
    else {
        // Half of torchrun's names, and no other launcher's.
        return match number(WORLD_SIZE)? {
            Some(_) => Err(Error::RankUnset),
            None => Ok(None),
        };
    };
    if rank >= n_ranks {
        return Err(Error::RankBeyond { rank, n_ranks });
    }
    let host = match get(MASTER_ADDR).or(host) {
        Some(host) => host,
        None if n_ranks == 1 => "127.0.0.1".to_owned(),
        None => return Err(Error::MasterUnset),
    };
    let port = match get(MASTER_PORT) {
        Some(text) => match text.parse::<u16>() {
            Ok(port) => port,
            Err(_) => return Err(no(MASTER_PORT, text, "port")),
        },
        // Jobs of one host keep out of each other's way.
        None => match number(SLURM_JOB_ID)? {
            Some(job) => PORT + (job % 8192) as u16 * 4,
            None => PORT,
        },
    };
    // torchrun keeps a store of its own on MASTER_PORT for as long as it runs.
    let first = u16::from(get(TORCHELASTIC_USE_AGENT_STORE).as_deref() == Some("True"));
    let ports = [first, first + 1].map(|more| port.saturating_add(more));
    Ok(Some(Launch {
        rank,
        n_ranks,
        local_rank,
        host,
        ports: ports.to_vec(),
    }))
}

/// Processes of the run that the variables speak of, whichever of them this one is; 1 without them.
///
/// # Errors
/// [`Error::Variable`].
pub fn n_ranks(get: &dyn Fn(&str) -> Option<String>) -> Result<usize> {
    if let Some(started) = started(get)? {
        return Ok(started.n_ranks.max(1));
    }
    for name in [WORLD_SIZE, OMPI_SIZE, SLURM_TASKS] {
        if let Some(n_ranks) = number(get, name)? {
            return Ok(n_ranks.max(1));
        }
    }
    Ok(1)
}

/// What a launcher says of this process.
struct Started {
    rank: usize,
    n_ranks: usize,
    local_rank: usize,
    /// Where rank 0 is, as far as the launcher knows.
    host: Option<String>,
}

/// The first launcher that says both which process this is and of how many: a job script may set a number of processes for another one.
fn started(get: &dyn Fn(&str) -> Option<String>) -> Result<Option<Started>> {
    let number = |name| number(get, name);
    if let Some(n_ranks) = number(WORLD_SIZE)?
        && let Some(rank) = number(RANK)?
    {
        return Ok(Some(Started {
            rank,
            n_ranks,
            local_rank: number(LOCAL_RANK)?.unwrap_or(0),
            host: None,
        }));
    }
    if let (Some(rank), Some(n_ranks)) = (number(OMPI_RANK)?, number(OMPI_SIZE)?) {
        let one_host = number(OMPI_LOCAL_SIZE)? == Some(n_ranks);
        return Ok(Some(Started {
            rank,
            n_ranks,
            local_rank: number(OMPI_LOCAL_RANK)?.unwrap_or(0),
            host: one_host.then(|| "127.0.0.1".to_owned()),
        }));
    }
    if let (Some(rank), Some(n_ranks)) = (number(SLURM_PROCID)?, number(SLURM_TASKS)?)
        && n_ranks > 1
    {
        return Ok(Some(Started {
            rank,
            n_ranks,
            local_rank: number(SLURM_LOCALID)?.unwrap_or(0),
            host: get(SLURM_NODELIST).map(|nodes| first_host(&nodes)),
        }));
    }
    Ok(None)
}

fn number(get: &dyn Fn(&str) -> Option<String>, name: &str) -> Result<Option<usize>> {
    let Some(text) = get(name) else {
        return Ok(None);
    };
    match text.parse() {
        Ok(number) => Ok(Some(number)),
        Err(_) => Err(no(name, text, "number")),
    }
}

fn no(name: &str, text: String, expected: &'static str) -> Error {
    Error::Variable {
        name: name.to_owned(),
        text,
        expected,
    }
}

/// The first of Slurm's list of hosts: `gpu[07-09,12],cpu1` begins with `gpu07`.
fn first_host(nodes: &str) -> String {
    let end = nodes.find([',', '[']).unwrap_or(nodes.len());
    let (name, rest) = nodes.split_at(end);
    let number = rest.strip_prefix('[').map_or("", |numbers| {
        numbers.split([',', '-', ']']).next().unwrap_or("")
    });
    format!("{name}{number}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> impl Fn(&str) -> Option<String> {
        move |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        }
    }

    fn launch(variables: &[(&str, &str)]) -> Result<Option<Launch>> {
        from_env(&of(variables))
    }

    fn count(variables: &[(&str, &str)]) -> usize {
        n_ranks(&of(variables)).unwrap()
    }

    fn check(variables: &[(&str, &str)], expect: (usize, usize, usize, &str, [u16; 2])) {
        let launch = launch(variables).unwrap().unwrap();
        let Launch {
            rank,
            n_ranks,
            local_rank,
            host,
            ports,
        } = launch;
        let (expect_rank, expect_ranks, expect_local, expect_host, expect_ports) = expect;
        assert_eq!(
            (rank, n_ranks, local_rank),
            (expect_rank, expect_ranks, expect_local)
        );
        assert_eq!(
            (host.as_str(), ports.as_slice()),
            (expect_host, &expect_ports[..])
        );
    }

    #[test]
    fn every_launcher_gives_a_place() {
        // torchrun, whose agent holds the port.
        check(
            &[
                ("RANK", "5"),
                ("WORLD_SIZE", "8"),
                ("LOCAL_RANK", "1"),
                ("MASTER_ADDR", "10.0.0.1"),
                ("MASTER_PORT", "29400"),
                ("TORCHELASTIC_USE_AGENT_STORE", "True"),
                ("SLURM_PROCID", "3"),
                ("SLURM_STEP_NUM_TASKS", "4"),
            ],
            (5, 8, 1, "10.0.0.1", [29401, 29402]),
        );
        // A Kubernetes job: one process a pod.
        check(
            &[
                ("RANK", "1"),
                ("WORLD_SIZE", "2"),
                ("MASTER_ADDR", "train-master-0"),
                ("MASTER_PORT", "23456"),
            ],
            (1, 2, 0, "train-master-0", [23456, 23457]),
        );
        // mpirun on one host.
        check(
            &[
                ("OMPI_COMM_WORLD_RANK", "2"),
                ("OMPI_COMM_WORLD_SIZE", "4"),
                ("OMPI_COMM_WORLD_LOCAL_RANK", "2"),
                ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
            ],
            (2, 4, 2, "127.0.0.1", [29500, 29501]),
        );
        // srun on several.
        check(
            &[
                ("SLURM_PROCID", "9"),
                ("SLURM_STEP_NUM_TASKS", "16"),
                ("SLURM_LOCALID", "1"),
                ("SLURM_STEP_NODELIST", "gpu[07-08]"),
                ("SLURM_JOB_ID", "8195"),
            ],
            (9, 16, 1, "gpu07", [29512, 29513]),
        );
        check(
            &[("RANK", "0"), ("WORLD_SIZE", "1")],
            (0, 1, 0, "127.0.0.1", [29500, 29501]),
        );
    }

    #[test]
    fn a_number_of_processes_without_a_rank_leaves_the_word_to_the_next_launcher() {
        // As a script that sbatch runs exports them for PyTorch, before srun.
        let script = [("WORLD_SIZE", "16"), ("MASTER_ADDR", "10.0.0.1")];
        let srun = [
            ("SLURM_PROCID", "9"),
            ("SLURM_STEP_NUM_TASKS", "8"),
            ("SLURM_LOCALID", "1"),
            ("SLURM_STEP_NODELIST", "gpu[07-08]"),
        ];
        let rank_beyond = launch(&[&script[..], &srun[..]].concat());
        assert!(matches!(rank_beyond, Err(Error::RankBeyond { .. })));
        let srun = [("SLURM_STEP_NUM_TASKS", "12"), ("SLURM_PROCID", "9")];
        let both = [&script[..], &srun[..]].concat();
        check(&both, (9, 12, 0, "10.0.0.1", [29500, 29501]));
        assert_eq!(count(&both), 12);
        let mpirun = [
            ("OMPI_COMM_WORLD_RANK", "2"),
            ("OMPI_COMM_WORLD_SIZE", "4"),
            ("OMPI_COMM_WORLD_LOCAL_RANK", "1"),
        ];
        let both = [&script[..], &mpirun[..]].concat();
        check(&both, (2, 4, 1, "10.0.0.1", [29500, 29501]));
        assert_eq!(count(&both), 4);
        // In the script itself there is no rank; how many are planned for is known all the same.
        let batch = [&script[..], &[("SLURM_PROCID", "0")][..]].concat();
        assert!(matches!(launch(&batch), Err(Error::RankUnset)));
        assert_eq!(count(&batch), 16);
        assert_eq!(count(&[]), 1);
    }

    #[test]
    fn a_process_by_itself_is_no_launch() {
        assert_eq!(launch(&[]).unwrap(), None);
        // Some systems set a rank for everything they start; a batch script of Slurm is no step of several tasks.
        assert_eq!(launch(&[("RANK", "0")]).unwrap(), None);
        let batch = [("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")];
        assert_eq!(launch(&batch).unwrap(), None);
    }

    #[test]
    fn what_is_missing_is_named() {
        for (variables, word) in [
            (vec![("WORLD_SIZE", "2")], "RANK is not"),
            (
                vec![("WORLD_SIZE", "2"), ("RANK", "2")],
                "ranks count from 0",
            ),
            (
                vec![("WORLD_SIZE", "2"), ("RANK", "1")],
                "MASTER_ADDR is not set",
            ),
            (
                vec![("WORLD_SIZE", "two"), ("RANK", "1")],
                "`two`, which is no number",
            ),
            (
                vec![("OMPI_COMM_WORLD_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2")],
                "MASTER_ADDR is not set",
            ),
        ] {
            let error = launch(&variables).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_process_takes_the_gpu_of_its_number_unless_one_is_named() {
        let launch = launch(&[
            ("RANK", "5"),
            ("WORLD_SIZE", "8"),
            ("LOCAL_RANK", "3"),
            ("MASTER_ADDR", "x"),
        ]);
        let launch = launch.unwrap().unwrap();
        for (asked, n_gpus, expect) in [
            ("auto", 8, "cuda:3"),
            ("cuda", 8, "cuda:3"),
            ("cuda", 1, "cuda:0"),
            ("auto", 0, "cpu"),
            ("cuda", 0, "cuda:3"),
            ("cuda:6", 8, "cuda:6"),
            ("cpu", 8, "cpu"),
        ] {
            assert_eq!(launch.device(asked, n_gpus), expect);
        }
    }

    #[test]
    fn first_host_of_a_list_is_read_as_slurm_writes_it() {
        for (nodes, expect) in [
            ("n1", "n1"),
            ("n1,n2", "n1"),
            ("gpu[07-09,12],cpu1", "gpu07"),
            ("gpu[3]", "gpu3"),
            ("rack2-node[010,012]", "rack2-node010"),
        ] {
            assert_eq!(first_host(nodes), expect);
        }
    }
}
