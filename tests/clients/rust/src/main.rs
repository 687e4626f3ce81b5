//! Role credentials, as the SDK for Rust fetches them.

use std::process::ExitCode;

use aws_config::{imds::credentials::ImdsCredentialsProvider, provider_config::ProviderConfig};
use aws_credential_types::provider::ProvideCredentials as _;
use aws_smithy_http_client::Builder;

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let config = ProviderConfig::default().with_http_client(Builder::new().build_http());
    let provider = ImdsCredentialsProvider::builder()
        .configure(&config)
        .build();
    match provider.provide_credentials().await {
        Ok(credentials) => {
            println!("{}", credentials.access_key_id());
            ExitCode::SUCCESS
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}
