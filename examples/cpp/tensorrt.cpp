// Runs a bundle's TensorRT engine (8.5 or later) on one input file, by tensor names: no bindings, no plugins.
//   g++ -std=c++17 tensorrt.cpp -o run-tensorrt -I/usr/local/cuda/include -L/usr/local/cuda/lib64 -lnvinfer -lcudart
//   ./preprocess ... < photo.ppm | ./run-tensorrt BUNDLE/engines/tensorrt/tensorrt.engine
// An engine with the preprocessing inside (--embed-preprocess) takes the picture's bytes themselves, at its native size.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

struct Logger : nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kWARNING) std::cerr << message << '\n';
    }
};

struct Tensor {
    std::string name;
    std::vector<char> host;
    void* device = nullptr;
    bool is_float = false;
};

static int failed(const char* reason) {
    std::cerr << reason << '\n';
    return 1;
}

static size_t bytes_of(const nvinfer1::Dims& dims, nvinfer1::DataType type) {
    size_t bytes = type == nvinfer1::DataType::kFLOAT || type == nvinfer1::DataType::kINT32 ? 4
                   : type == nvinfer1::DataType::kHALF                                      ? 2
                                                                                            : 1;
    for (int i = 0; i < dims.nbDims; ++i) bytes *= static_cast<size_t>(dims.d[i]);
    return bytes;
}

static Tensor tensor_of(const nvinfer1::ICudaEngine& engine, const nvinfer1::Dims& dims, const char* name) {
    Tensor made;
    made.name = name;
    made.host.resize(bytes_of(dims, engine.getTensorDataType(name)));
    made.is_float = engine.getTensorDataType(name) == nvinfer1::DataType::kFLOAT;
    return made;
}

int main(int count, char** words) {
    if (count != 2) return std::cerr << "usage: run-tensorrt ENGINE < input.bin\n", 2;
    std::ifstream file(words[1], std::ios::binary);
    const std::vector<char> plan(std::istreambuf_iterator<char>(file), {});
    if (plan.empty()) return failed("the engine cannot be read");
    Logger logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(logger));
    if (!runtime) return failed("no NVIDIA driver that fits this TensorRT");
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(plan.data(), plan.size()));
    if (!engine) return failed("built for another GPU or another TensorRT: run build-engine.sh here");
    std::unique_ptr<nvinfer1::IExecutionContext> context(engine->createExecutionContext());

    std::vector<Tensor> inputs, outputs;
    for (int i = 0; i < engine->getNbIOTensors(); ++i) {
        const char* name = engine->getIOTensorName(i);
        if (engine->getTensorIOMode(name) != nvinfer1::TensorIOMode::kINPUT) continue;
        nvinfer1::Dims shape = engine->getTensorShape(name);
        if (shape.d[0] < 0) shape.d[0] = 1;
        if (!context->setInputShape(name, shape)) return failed("the engine does not take a batch of 1");
        inputs.push_back(tensor_of(*engine, shape, name));
    }
    for (int i = 0; i < engine->getNbIOTensors(); ++i) {  // their shapes are known when those of the inputs are
        const char* name = engine->getIOTensorName(i);
        if (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT) continue;
        outputs.push_back(tensor_of(*engine, context->getTensorShape(name), name));
    }
    for (auto* tensors : {&inputs, &outputs}) {
        for (Tensor& tensor : *tensors) {
            if (cudaMalloc(&tensor.device, tensor.host.size()) != cudaSuccess) return failed("no memory on the GPU");
            context->setTensorAddress(tensor.name.c_str(), tensor.device);
        }
    }

    cudaStream_t stream;
    if (cudaStreamCreate(&stream) != cudaSuccess) return failed("no CUDA stream");
    for (Tensor& tensor : inputs) {
        if (!std::cin.read(tensor.host.data(), static_cast<std::streamsize>(tensor.host.size())))
            return failed("the input is shorter than the engine's");
        cudaMemcpyAsync(tensor.device, tensor.host.data(), tensor.host.size(), cudaMemcpyHostToDevice, stream);
    }
    const bool done = context->enqueueV3(stream);
    for (Tensor& tensor : outputs)
        cudaMemcpyAsync(tensor.host.data(), tensor.device, tensor.host.size(), cudaMemcpyDeviceToHost, stream);
    if (cudaStreamSynchronize(stream) != cudaSuccess || !done) return failed("the engine did not run");

    for (const Tensor& tensor : outputs) {
        if (!tensor.is_float) return failed("an output is not FP32");
        const auto* values = reinterpret_cast<const float*>(tensor.host.data());
        for (size_t i = 0; i < tensor.host.size() / sizeof(float); ++i)
            std::cout << tensor.name << ' ' << values[i] << '\n';
    }
    for (auto* tensors : {&inputs, &outputs})
        for (Tensor& tensor : *tensors) cudaFree(tensor.device);
    cudaStreamDestroy(stream);
    return 0;
}
