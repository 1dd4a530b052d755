//! Listening and serving until told to stop.

use std::future::Future;
use std::io::ErrorKind;
use std::time::Duration;

use axum::Router;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tracing::info;

use crate::error::{Error, Result};

/// How long open replies may go on after the signal to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// Takes the port.
///
/// # Errors
/// [`Error::PortInUse`], or [`Error::Bind`] for anything else the system objects to.
pub async fn bind(host: &str, port: u16) -> Result<TcpListener> {
    TcpListener::bind((host, port))
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

/// Serves until `shutdown` completes, then takes no new connections and gives open replies ten seconds.
///
/// # Errors
/// [`Error::Serve`] if accepting connections fails.
pub async fn run(
    listener: TcpListener,
    app: Router,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> Result<()> {
    let (stopping, stopped) = oneshot::channel();
    let signal = async move {
        shutdown.await;
        info!("stopping");
        // Nobody listens any more only if serving has ended already.
        let _ = stopping.send(());
    };
    let serving = axum::serve(listener, app).with_graceful_shutdown(signal);
    let deadline = async move {
        // An error means that the signal was dropped with the server, which then ends by itself.
        match stopped.await {
            Ok(()) => tokio::time::sleep(DRAIN).await,
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        result = serving => result.map_err(|source| Error::Serve { source }),
        () = deadline => Ok(()),
    }
}
