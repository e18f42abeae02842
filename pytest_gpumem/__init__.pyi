"""What `__init__.py` offers, for type checkers."""

from pytest_gpumem.archive.consolidator import (
    Consolidation as Consolidation,
)
from pytest_gpumem.archive.consolidator import (
    GpuConsolidator as GpuConsolidator,
)
from pytest_gpumem.archive.shared import (
    get_gpu_consolidator as get_gpu_consolidator,
)
from pytest_gpumem.archive.store import (
    ArchiveStore as ArchiveStore,
)
from pytest_gpumem.archive.subclasses import (
    allow_subclass as allow_subclass,
)
from pytest_gpumem.errors import (
    ArchiveError as ArchiveError,
)
from pytest_gpumem.errors import (
    ArgumentError as ArgumentError,
)
from pytest_gpumem.errors import (
    DamagedError as DamagedError,
)
from pytest_gpumem.errors import (
    DiskError as DiskError,
)
from pytest_gpumem.errors import (
    InUseError as InUseError,
)
from pytest_gpumem.errors import (
    KeyRefusedError as KeyRefusedError,
)
from pytest_gpumem.errors import (
    LeaseError as LeaseError,
)
from pytest_gpumem.errors import (
    LeaseTimeout as LeaseTimeout,
)
from pytest_gpumem.errors import (
    NotFoundError as NotFoundError,
)
from pytest_gpumem.errors import (
    QuotaError as QuotaError,
)
from pytest_gpumem.errors import (
    RequestRefusedError as RequestRefusedError,
)
from pytest_gpumem.errors import (
    StateRefusedError as StateRefusedError,
)
from pytest_gpumem.errors import (
    TooLarge as TooLarge,
)
from pytest_gpumem.errors import (
    UnknownVersionError as UnknownVersionError,
)
from pytest_gpumem.errors import (
    WrongKeyError as WrongKeyError,
)
from pytest_gpumem.forensics.analysis import (
    analyze_oom_sequence as analyze_oom_sequence,
)
from pytest_gpumem.leases.api import (
    gpu_lease as gpu_lease,
)
from pytest_gpumem.leases.store import (
    Lease as Lease,
)
from pytest_gpumem.records.plain import (
    load_run as load_run,
)
from pytest_gpumem.records.run import (
    RunRecord as RunRecord,
)
from pytest_gpumem.routing.model_pool import (
    ModelPool as ModelPool,
)
from pytest_gpumem.routing.placement import (
    load_sentence_transformer as load_sentence_transformer,
)
from pytest_gpumem.routing.resource_manager import (
    HybridResourceManager as HybridResourceManager,
)
from pytest_gpumem.routing.resource_manager import (
    get_resource_manager as get_resource_manager,
)
from pytest_gpumem.routing.resource_manager import (
    get_sentence_transformer_device as get_sentence_transformer_device,
)
from pytest_gpumem.tracking.memory import (
    GpuMemory as GpuMemory,
)

__version__: str
