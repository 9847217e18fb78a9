//! Encrypted connections.

use std::sync::Arc;

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use tokio_postgres_rustls::MakeRustlsConnect;

use super::super::SinkError;
use super::failure::KIND;

/// Connections to servers whose certificates these authorities, in PEM, have signed.
pub(super) fn connector(authorities: &[u8]) -> Result<MakeRustlsConnect, SinkError> {
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(authorities) {
        let certificate = certificate.map_err(|e| SinkError::misconfigured(KIND, e))?;
        roots.add(certificate).map_err(|e| SinkError::misconfigured(KIND, e))?;
    }
    if roots.is_empty() {
        return Err(SinkError::misconfigured(KIND, "the PEM text holds no certificate"));
    }
    // Named, since a program may have several providers, and no default.
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| SinkError::misconfigured(KIND, e))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(MakeRustlsConnect::new(config))
}
