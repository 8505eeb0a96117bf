//! The sink that is a real API server.

use std::future::Future;
use std::pin::Pin;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Service;
use kube::Client;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::core::Request;
use landfall_core::ip::virtual_ip_name;
use landfall_core::ipam::{RecordChange, ServiceStatus};
use serde_json::Value;

use super::body::{self, API_VERSION, FIELD_MANAGER};
use super::{Sink, Write, WriteError};

/// Writes through a client.
#[derive(Clone)]
pub struct Kubernetes {
    client: Client,
    /// Who we are, for Events.
    identity: String,
}

impl Kubernetes {
    /// A sink that writes as `identity`.
    pub fn new(client: Client, identity: String) -> Self {
        Self { client, identity }
    }
}

impl Sink for Kubernetes {
    fn write(&self, write: Write) -> Pin<Box<dyn Future<Output = Result<(), WriteError>> + Send>> {
        let client = self.client.clone();
        let params = PatchParams::apply(FIELD_MANAGER).force();
        let now = Timestamp::now();
        let ours = |kind: &str| Request::new(format!("/apis/{API_VERSION}/{kind}"));
        let request = match &write {
            Write::Record(RecordChange::Put(record)) => ours("virtualips").patch(
                &virtual_ip_name(record.address),
                &params,
                &Patch::Apply(body::virtual_ip(record)),
            ),
            Write::Record(RecordChange::Remove(address)) => {
                ours("virtualips").delete(&virtual_ip_name(*address), &DeleteParams::default())
            }
            Write::Service(status) => Request::new(format!(
                "/api/v1/namespaces/{}/services",
                status.key.namespace
            ))
            .patch_subresource(
                "status",
                &status.key.name,
                &params,
                &Patch::Apply(body::service_status(status, now)),
            ),
            Write::Pool(status) => ours("ipaddresspools").patch_subresource(
                "status",
                &status.name,
                &params,
                &Patch::Apply(body::pool_status(status, now)),
            ),
            Write::Policy(status) => ours("egresspolicies").patch_subresource(
                "status",
                &status.name,
                &params,
                &Patch::Apply(body::policy_status(status, now)),
            ),
            Write::Event(note) => {
                let body: Value = body::event(note, &self.identity);
                Request::new(format!(
                    "/apis/events.k8s.io/v1/namespaces/{}/events",
                    note.namespace()
                ))
                .create(&PostParams::default(), body.to_string().into_bytes())
            }
        };
        Box::pin(async move {
            let request = request.map_err(|error| WriteError::Failed(error.to_string()))?;
            // Most Services that left us are gone altogether, and that is cheaper to ask than to be told.
            if let Write::Service(status) = &write
                && status.is_farewell()
                && !exists(&client, status).await?
            {
                return Err(WriteError::Gone);
            }
            // The answer is not parsed: what was written comes back by the watch.
            match client.request_text(request).await {
                Ok(_) => Ok(()),
                Err(kube::Error::Api(status)) => judge(&write, status.code, &status.message),
                Err(error) => Err(WriteError::Failed(error.to_string())),
            }
        })
    }
}

/// Whether the very Service that is meant still exists.
async fn exists(client: &Client, status: &ServiceStatus) -> Result<bool, WriteError> {
    let api: Api<Service> = Api::namespaced(client.clone(), &status.key.namespace);
    let found = api
        .get_metadata_opt(&status.key.name)
        .await
        .map_err(|error| WriteError::Failed(error.to_string()))?;
    Ok(found.is_some_and(|found| found.metadata.uid.as_deref() == Some(&status.uid)))
}

/// What an error answer means for this write.
fn judge(write: &Write, code: u16, message: &str) -> Result<(), WriteError> {
    match (write, code) {
        (Write::Record(RecordChange::Remove(_)), 404) | (Write::Event(_), 409) => Ok(()),
        // The object of this UID is no more: there is none, or another one of its name.
        (Write::Service(_) | Write::Policy(_), 404 | 409)
        | (Write::Pool(_) | Write::Event(_), 404)
        // No Event can be made in a namespace that is going away, and none that is refused is taken later.
        | (Write::Event(_), 400 | 403 | 422) => Err(WriteError::Gone),
        (Write::Service(_) | Write::Policy(_), 422) if message.contains("metadata.uid") => {
            Err(WriteError::Gone)
        }
        (_, code) => Err(WriteError::Failed(format!("{code}: {message}"))),
    }
}
