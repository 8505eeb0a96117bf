//! The admin endpoints: `/metrics`, `/healthz`, `/readyz` and `/debug/state`.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Json, Response};
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde_json::Value;
use tokio::net::TcpListener;
use tokio_util::task::AbortOnDropHandle;

/// What [`serve`] shows.
struct Shown<R, S> {
    registry: Registry,
    ready: R,
    state: S,
}

/// The running endpoints; dropping it ends them.
#[derive(Debug)]
pub struct Admin {
    /// Where they listen.
    pub address: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

/// Serves the endpoints on `address`. `ready` answers `/readyz`, `state` is what `/debug/state` shows.
pub async fn serve<R, S>(
    address: SocketAddr,
    registry: Registry,
    ready: R,
    state: S,
) -> anyhow::Result<Admin>
where
    R: Fn() -> bool + Send + Sync + 'static,
    S: Fn() -> Value + Send + Sync + 'static,
{
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!(
            "cannot listen on {address} for the admin endpoints: choose another --admin-address"
        )
    })?;
    let address = listener.local_addr()?;
    let shown = Arc::new(Shown {
        registry,
        ready,
        state,
    });
    let (metrics, ready, state) = (shown.clone(), shown.clone(), shown);
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route(
            "/readyz",
            get(move || async move { readyz((ready.ready)()) }),
        )
        .route(
            "/metrics",
            get(move || async move { render(&metrics.registry) }),
        )
        .route(
            "/debug/state",
            get(move || async move { Json((state.state)()) }),
        );
    let task = tokio::spawn(async move {
        if let Err(problem) = axum::serve(listener, router).await {
            tracing::error!(%problem, "the admin endpoints ended");
        }
    });
    Ok(Admin {
        address,
        _task: AbortOnDropHandle::new(task),
    })
}

fn readyz(ready: bool) -> Response {
    if ready {
        "ok\n".into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "not yet\n").into_response()
    }
}

fn render(registry: &Registry) -> Response {
    let mut text = String::new();
    match encode(&mut text, registry) {
        Ok(()) => (
            [(
                header::CONTENT_TYPE,
                "application/openmetrics-text; version=1.0.0; charset=utf-8",
            )],
            text,
        )
            .into_response(),
        Err(problem) => (StatusCode::INTERNAL_SERVER_ERROR, problem.to_string()).into_response(),
    }
}
