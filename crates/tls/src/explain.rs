//! What went wrong in a handshake, in words for the person who has to mend it.

use rustls::{AlertDescription, CertificateError, Error, InvalidMessage};

use crate::NoNode;

/// The words for a failure that TLS is the reason of; `None` for any other.
pub fn explain(error: &std::io::Error) -> Option<String> {
    let error = error.get_ref()?;
    if let Some(error) = error.downcast_ref::<NoNode>() {
        return Some(error.to_string());
    }
    // Libraries wrap what they were given.
    if let Some(error) = error.downcast_ref::<std::io::Error>() {
        return explain(error);
    }
    Some(match error.downcast_ref::<Error>()? {
        Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "the other side does not speak TLS: has it been started without certificates?".to_owned()
        }
        Error::NoCertificatesPresented => "the other side shows no certificate".to_owned(),
        Error::InvalidCertificate(error) => match error {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                "the certificate of the other side is not of this cluster's CA".to_owned()
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                "the certificate of the other side has expired: give it a new one".to_owned()
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                "the certificate of the other side is not valid yet: is the clock of this machine right?"
                    .to_owned()
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                "the certificate of the other side is not made for this end of a connection".to_owned()
            }
            other => format!("the certificate of the other side is refused: {other}"),
        },
        Error::AlertReceived(alert) => match alert {
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                "the other side refuses the certificate of this one: it is not of its cluster's CA".to_owned()
            }
            AlertDescription::CertificateExpired => {
                "the other side refuses the certificate of this one: it has expired".to_owned()
            }
            AlertDescription::CertificateRequired => {
                "the other side wants a certificate, and this one has none".to_owned()
            }
            other => format!("the other side refuses TLS with this one: {other:?}"),
        },
        other => format!("TLS failed: {other}"),
    })
}
