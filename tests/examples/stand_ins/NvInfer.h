// A stand-in for TensorRT's header. The declarations are those of TensorRT 10 as far as examples/cpp/tensorrt.cpp goes; the
// engine takes x (-1, 3), in FP32 or, where its plan says "bytes", UINT8, and gives double (1, 3) and sum (1).
#pragma once
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstring>
#include <string>

namespace nvinfer1 {
enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5 };
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
struct Dims {
    int32_t nbDims;
    int64_t d[8];
};

class ILogger {
   public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, char const* message) noexcept = 0;
    virtual ~ILogger() = default;
};

class IExecutionContext {
   public:
    bool is_bytes = false;
    void *x = nullptr, *twice = nullptr, *sum = nullptr;
    bool setInputShape(char const*, Dims const& dims) noexcept { return dims.d[0] == 1; }
    Dims getTensorShape(char const* name) const noexcept {
        return std::string(name) == "sum" ? Dims{1, {1}} : Dims{2, {1, 3}};
    }
    bool setTensorAddress(char const* name, void* data) noexcept {
        (std::string(name) == "x" ? x : std::string(name) == "sum" ? sum : twice) = data;
        return true;
    }
    bool enqueueV3(cudaStream_t) noexcept {
        float total = 0;
        for (int i = 0; i < 3; ++i) {
            const float value = is_bytes ? static_cast<unsigned char*>(x)[i] : static_cast<float*>(x)[i];
            static_cast<float*>(twice)[i] = 2 * value;
            total += value;
        }
        *static_cast<float*>(sum) = total;
        return true;
    }
};

class ICudaEngine {
   public:
    bool is_bytes = false;
    int32_t getNbIOTensors() const noexcept { return 3; }
    char const* getIOTensorName(int32_t index) const noexcept {
        static char const* const names[] = {"double", "x", "sum"};
        return names[index];
    }
    TensorIOMode getTensorIOMode(char const* name) const noexcept {
        return std::string(name) == "x" ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
    }
    Dims getTensorShape(char const*) const noexcept { return {2, {-1, 3}}; }
    DataType getTensorDataType(char const* name) const noexcept {
        return is_bytes && std::string(name) == "x" ? DataType::kUINT8 : DataType::kFLOAT;
    }
    IExecutionContext* createExecutionContext() noexcept {
        auto* made = new IExecutionContext;
        made->is_bytes = is_bytes;
        return made;
    }
};

class IRuntime {
   public:
    ILogger* logger = nullptr;
    ICudaEngine* deserializeCudaEngine(void const* blob, std::size_t size) noexcept {
        const std::string plan(static_cast<char const*>(blob), size);
        if (plan != "plan" && plan != "bytes") {
            logger->log(ILogger::Severity::kERROR, "Serialization failed");
            return nullptr;
        }
        auto* made = new ICudaEngine;
        made->is_bytes = plan == "bytes";
        return made;
    }
};

inline IRuntime* createInferRuntime(ILogger& logger) noexcept {
    auto* made = new IRuntime;
    made->logger = &logger;
    return made;
}
}  // namespace nvinfer1
