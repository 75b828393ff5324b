# SPDX-License-Identifier: Apache-2.0
"""The gRPC API: hints in, events out, and what operators see and do."""
