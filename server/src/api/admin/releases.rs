//! Releases and trust documents.

use fwpush_keys::id::{OperatorId, Product};
use fwpush_proto::v1;
use tonic::{Code, Status};

use super::{Admin, optional_id, views};
use crate::{
    api::status as map,
    releases::PublishError,
    trust::{self, Published},
};

pub async fn publish(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::PublishReleaseRequest,
) -> Result<v1::Release, Status> {
    let published = admin
        .releases
        .publish(&request.envelope, &request.file_name, operator.as_str())
        .await;
    let row = published.map_err(refused)?;
    Ok(views::release(&row))
}

/// Why a release is refused, for its engineer.
pub fn refused(error: PublishError) -> Status {
    let code = match &error {
        PublishError::Db(_) => Code::Unavailable,
        PublishError::SeqTaken(_) | PublishError::VersionTaken(_) | PublishError::IdTaken(_) => {
            Code::AlreadyExists
        }
        PublishError::OlderSeq { .. }
        | PublishError::Missing(_)
        | PublishError::Expired(_)
        | PublishError::IssuedInFuture(_)
        | PublishError::Revoked(_)
        | PublishError::BelowFloor { .. }
        | PublishError::Size { .. } => Code::FailedPrecondition,
        PublishError::Envelope(_) | PublishError::Product | PublishError::FileName => {
            Code::InvalidArgument
        }
        PublishError::Refused(_) => Code::PermissionDenied,
    };
    match error {
        PublishError::Db(error) => map::db(error),
        error => Status::new(code, words(&error)),
    }
}

pub async fn list(
    admin: &Admin,
    _: &OperatorId,
    request: v1::ListReleasesRequest,
) -> Result<v1::ListReleasesResponse, Status> {
    let product: Option<Product> = optional_id("product", &request.product)?;
    let releases = admin
        .db
        .list_releases(product.as_ref())
        .await
        .map_err(map::db)?;
    Ok(v1::ListReleasesResponse {
        releases: releases.iter().map(|row| views::release(row)).collect(),
    })
}

pub async fn publish_trust(
    admin: &Admin,
    operator: &OperatorId,
    request: v1::PublishTrustRequest,
) -> Result<v1::TrustInfo, Status> {
    let published = admin
        .trust
        .publish(&request.envelope, operator.as_str())
        .await
        .map_err(trust_refused)?;
    let lists = match published {
        Published::Root => Vec::new(),
        Published::Revocation(product) => vec![product],
        // The call before this one may have been cut between the list's commit and what follows from it.
        Published::Same => admin
            .trust
            .revocations()
            .iter()
            .map(|list| list.product.clone())
            .collect(),
    };
    for product in lists {
        admin
            .trust
            .apply_revocation(&product, operator.as_str())
            .await
            .map_err(map::db)?;
    }
    Ok(views::trust(&admin.trust))
}

fn trust_refused(error: trust::PublishError) -> Status {
    use trust::PublishError as E;
    let code = match error {
        E::Db(error) => return map::db(error),
        E::Envelope(_) | E::Release | E::Product => Code::InvalidArgument,
        E::Refused(_) => Code::PermissionDenied,
        E::NotNewer { .. } => Code::FailedPrecondition,
    };
    Status::new(code, words(&error))
}

/// An error with what caused it: these are about the operator's own document and hold no internals.
fn words(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}
