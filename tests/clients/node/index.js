// Role credentials, as the SDK for JavaScript fetches them.
const { fromInstanceMetadata } = require("@smithy/credential-provider-imds");

fromInstanceMetadata({ timeout: 20000, maxRetries: 0 })()
  .then((credentials) => console.log(credentials.accessKeyId))
  .catch((error) => {
    console.log(error.name);
    process.exitCode = 1;
  });
