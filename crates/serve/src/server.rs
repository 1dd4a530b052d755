//! Listening, and serving every connection within its limits until told to stop.

use std::convert::Infallible;
use std::future::Future;
use std::io::{self, ErrorKind};
use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use axum::Router;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{mpsc, watch};
use tracing::{debug, error, info};

use crate::connections::{Caller, ConnectionLimits, Reserve, Seats, network};
use crate::error::{Error, Result};
use crate::stall::Unstalled;

/// How long open replies may go on after the signal to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// Bytes that the system keeps for a reader who is behind; with a system's own megabytes a reply would be written whole for one who reads nothing.
const SEND_BUFFER_BYTES: u32 = 64 << 10;

/// Bytes that a connection keeps in each direction.
const BUFFER_BYTES: usize = 64 << 10;

/// Connections that wait to be taken, as the standard library has it or more.
const BACKLOG: u32 = 1024;

/// How long to wait where the system gives no connection, for want of descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Takes the port.
///
/// # Errors
/// [`Error::PortInUse`], or [`Error::Bind`] for anything else the system objects to.
pub async fn bind(host: &str, port: u16) -> Result<TcpListener> {
    listen(host, port)
        .await
        .map_err(|source| match source.kind() {
            ErrorKind::AddrInUse => Error::PortInUse {
                host: host.to_owned(),
                port,
            },
            _ => Error::Bind {
                host: host.to_owned(),
                port,
                source,
            },
        })
}

/// The first address of `host` that can be listened on.
async fn listen(host: &str, port: u16) -> io::Result<TcpListener> {
    let mut last = io::Error::new(ErrorKind::InvalidInput, "the name has no address");
    for address in tokio::net::lookup_host((host, port)).await? {
        match listen_on(address) {
            Ok(listener) => return Ok(listener),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn listen_on(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    // A port whose last connections the system still remembers can be taken; on Windows it can anyway, and the option would share it.
    if cfg!(not(windows)) {
        socket.set_reuseaddr(true)?;
    }
    // Connections have it from the socket that they come by.
    socket.set_send_buffer_size(SEND_BUFFER_BYTES)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Serves until `shutdown` completes, then takes no new connections and gives open replies ten seconds.
pub async fn run(
    listener: TcpListener,
    app: Router,
    limits: ConnectionLimits,
    shutdown: impl Future<Output = ()> + Send + 'static,
) {
    let (stopping, stop) = watch::channel(());
    // Nothing is ever sent: its end is seen when the last connection has dropped its sender.
    let (open, mut all_closed) = mpsc::channel::<Infallible>(1);
    let mut door = Door::new(app, limits, stop, open);
    let mut shutdown = pin!(shutdown);
    loop {
        let (stream, peer) = tokio::select! {
            accepted = accept(&listener) => accepted,
            () = shutdown.as_mut() => break,
        };
        door.let_in(stream, peer);
    }
    info!("stopping");
    // The port is free, idle connections close, and the others after their answer.
    drop(listener);
    drop(door);
    drop(stopping);
    if tokio::time::timeout(DRAIN, all_closed.recv())
        .await
        .is_err()
    {
        info!("open replies are broken off");
    }
}

/// The next connection.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok(accepted) => return accepted,
            // Its client left while it waited.
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::ConnectionRefused
                        | ErrorKind::ConnectionAborted
                        | ErrorKind::ConnectionReset
                ) => {}
            Err(error) => {
                error!(%error, "no connection can be taken");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// What every connection gets, and who is in.
struct Door {
    app: TowerToHyperService<Router>,
    limits: ConnectionLimits,
    seats: Seats,
    reserve: Reserve,
    stop: watch::Receiver<()>,
    open: mpsc::Sender<Infallible>,
}

impl Door {
    fn new(
        app: Router,
        limits: ConnectionLimits,
        stop: watch::Receiver<()>,
        open: mpsc::Sender<Infallible>,
    ) -> Self {
        Door {
            app: TowerToHyperService::new(app),
            limits,
            seats: Seats::new(&limits),
            reserve: Reserve::new(&limits),
            stop,
            open,
        }
    }

    /// Serves a connection on a task of its own.
    fn let_in(&mut self, stream: TcpStream, peer: SocketAddr) {
        // 1. a seat, or a place in the reserve for one request
        let network = network(peer.ip());
        let (seat, crowd) = match self.seats.take(network) {
            Ok(seat) => (Some(seat), None),
            Err(crowd) => (None, Some(crowd)),
        };
        let caller = Caller { network, crowd };

        // 2. the connection
        let app = self.app.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            request.extensions_mut().insert(caller);
            app.call(request)
        });
        let io = TokioIo::new(Unstalled::new(stream, self.limits.stall_time));
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.limits.header_time)
            .max_header_size(self.limits.header_bytes)
            .max_buf_size(BUFFER_BYTES.max(self.limits.header_bytes))
            .keep_alive(crowd.is_none())
            .serve_connection(io, service);

        // 3. until it ends, or the server does
        let mut stop = self.stop.clone();
        let open = self.open.clone();
        let task = tokio::spawn(async move {
            let _held = (seat, open);
            let mut connection = pin!(connection);
            let ended = tokio::select! {
                ended = connection.as_mut() => ended,
                // The sender is gone, which is the signal.
                _ = stop.changed() => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            };
            if let Err(error) = ended {
                debug!(%error, "a connection broke off");
            }
        });
        if crowd.is_some() {
            self.reserve.add(task.abort_handle());
        }
    }
}
